"""Runs another project's training script from its own clone, a step at a time, for benchmarks.speed.

This module has no code of the scripts. It executes the definitions of a script, replaces a few names in them (the
loader's iteration, which then waits for its turn before each batch; the evaluation, which is not timed), and executes
the script's main block until enough steps have run. The scripts are written for CUDA and float16: without a GPU their
text is first changed by _FOR_CPU, and float16, which is slow on a CPU, replaced by bfloat16. The script's own warm-up
run is skipped: the first steps of each kind are not counted instead.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import sys
import time
import types
from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import arguments
from benchmarks.turns import EnoughError, Pacer
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import positive
from dist_train.distributed.device import keep_memory
from dist_train.errors import DONE

_FOR_CPU = [
    (r"torch\.cuda\.", "cuda."),  # a replacement that `run` defines
    (r"\.cuda\(\)", ""),
    (r"\"cuda\"|'cuda'", "'cpu'"),
    (r"\.half\(\)", ".bfloat16()"),
    (r"torch\.half\b", "torch.bfloat16"),
    (r"\.pin_memory\(\)", ""),
]
_EPOCHS = 4  # that the measured steps are spread over, because the loader prepares its images anew in each
_COUNT = 50_000  # training images
_IMAGES, _FIRST_IMAGES = "images of an epoch", "images of the first epoch"


class Event:
    """Replaces torch.cuda.Event on a CPU."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at - self.at)


class Script(Protocol):
    """The changes to a script so that it takes turns."""

    def __init__(self, text: str, count: int, warm_up: int) -> None:
        """count: steps of each kind to measure, after `warm_up` that are not counted. Raises SystemExit when the
        text is not the expected script."""

    text: str

    def attach(self, names: dict[str, Any], pacer: Pacer) -> None:
        """Replace some of the names that the script has defined, so that the pacer receives its steps."""


class ByEpoch:
    """airbench94_muon.py and cifar10_speedrun.py. Their step changes once the whitening's bias no longer learns: after
    as many steps as are measured of the first kind. An epoch is cut short as soon as enough of its steps have run."""

    def __init__(self, text: str, count: int, warm_up: int) -> None:
        self.epochs = self._factor(text, "total_train_steps")
        self.learning = self._factor(text, "whiten_bias_train_steps")
        self.count, self.warm_up = count, warm_up
        self.text = re.sub(r"(?<=whiten_bias_train_steps = )ceil\(.*\)", str(count + warm_up), text)

    @staticmethod
    def _factor(text: str, name: str) -> float:
        factors = re.findall(rf"{name} = ceil\(([\d.]+) \* len\(train_loader\)\)\n", text)
        if len(factors) != 1:
            raise SystemExit(f"the script does not set {name} as expected")
        return float(factors[0])

    def attach(self, names: dict[str, Any], pacer: Pacer) -> None:
        main = names["main"]
        names["main"] = lambda run, *rest: None if run == "warmup" else main(run, *rest)
        names["evaluate"] = lambda *_, **__: 0.0
        loader = names["CifarLoader"]
        original = loader.__iter__
        each = self.count + self.warm_up
        taken = 0

        def batches(self_: Any) -> Iterator[Any]:
            nonlocal taken
            per_epoch = len(self_)
            total, learning = ceil(self.epochs * per_epoch), ceil(self.learning * per_epoch)
            if 2 * each >= total:
                raise SystemExit(f"{self.count} steps of each kind are too many: the script has {total} in total")
            part = min(per_epoch, ceil(2 * each / _EPOCHS))
            if not taken:
                epochs = ceil(total / per_epoch)
                steps = {"bias learns": learning, "bias fixed": total - learning}
                pacer.plan(
                    {**steps, _FIRST_IMAGES: 1, _IMAGES: epochs - 1},
                    ceil(2 * each / pacer.turn) + ceil(2 * each / part),
                )
            inner = original(self_)
            with pacer.once(_IMAGES if taken else _FIRST_IMAGES):
                first = next(inner)
            for number in range(part):
                if taken == 2 * each:
                    raise pacer.done()
                label = "bias fixed" if taken >= each else "bias learns"
                pacer.step(None if taken % each < self.warm_up else label)
                taken += 1
                yield next(inner) if number else first
            pacer.close()

        loader.__iter__ = batches


class Masked:
    """airbench96_faster.py. A small network first processes all batches and chooses the half of each that the large one
    then learns; every fourth step of the small one is a training step. Both load all images. The script never switches
    to its model with a fixed bias, because it compares an epoch with a number of steps."""

    def __init__(self, text: str, count: int, warm_up: int) -> None:
        self.text = text if "TORCHDYNAMO_DISABLE" not in os.environ else text.replace("._orig_mod", "")
        self.count, self.warm_up = count, warm_up

    def attach(self, names: dict[str, Any], pacer: Pacer) -> None:
        names["evaluate"] = lambda *_, **__: 0.0
        settings = names["hyp"]["opt"]
        loader = names["InfiniteCifarLoader"]
        original, crop = loader.__iter__, names["batch_crop"]
        each = self.count + self.warm_up
        epochs, runs, cropped = settings["train_epochs"], 0, False

        def marked_crop(*arguments: Any) -> Any:
            nonlocal cropped
            cropped = True
            return crop(*arguments)

        def batches(self_: Any) -> Iterator[Any]:
            nonlocal runs, cropped
            runs += 1
            total = ceil(_COUNT // self_.batch_size * epochs)
            prepared = ceil(total * self_.batch_size / _COUNT)
            if runs == 1:
                learning = ceil(total / 4)
                kinds = {"small, learns": learning, "small, chooses": total - learning, "large": total}
                pacer.plan({**kinds, _FIRST_IMAGES: 2, _IMAGES: 2 * (prepared - 1)}, 5 * each + 2 * _EPOCHS)
            inner = original(self_)
            with pacer.once(_FIRST_IMAGES):
                batch = next(inner)
            small = runs == 1
            steps, warm_up = (4 * each, 4 * self.warm_up) if small else (each, self.warm_up)
            try:
                for step in range(steps):
                    if step and step % ceil(steps / _EPOCHS) == 0:
                        with pacer.once(_IMAGES) as clock:  # skip batches until the next epoch begins
                            cropped = False
                            while not cropped:
                                clock.restart()
                                batch = next(inner)
                            clock.stop()
                    label = "large" if not small else "small, chooses" if step % 4 else "small, learns"
                    pacer.step(None if step < warm_up else label)
                    yield batch
                    batch = next(inner)  # counts for this step, which ends where the next one begins
                raise pacer.done()
            finally:  # the loop of the small network ends without `done`
                pacer.close()

        # both loops end after as many steps as the small network needs
        settings["train_epochs"] = Fraction(4 * each, _COUNT // settings["batch_size"])
        names["batch_crop"] = marked_crop
        loader.__iter__ = batches


SCRIPTS: dict[str, type[Script]] = {
    "airbench94_muon.py": ByEpoch,
    "airbench96_faster.py": Masked,
    "cifar10_speedrun.py": ByEpoch,
}


def run(path: Path, device: str, count: int, warm_up: int, pacer: Pacer) -> None:
    """Run a script until `count` steps of each kind are measured, after `warm_up` that are not counted."""
    script = SCRIPTS[path.name](path.read_text(encoding="utf-8"), count, warm_up)
    text = script.text
    if device == "cpu":
        for pattern, replacement in _FOR_CPU:
            text = re.sub(pattern, replacement, text)
    *definitions, main = ast.parse(text, str(path)).body
    assert isinstance(main, ast.If)
    module = types.ModuleType(path.stem)
    sys.modules[path.stem] = module  # where torch.compile looks for it
    sys.argv = [str(path)]  # the script reads itself
    no_ops = {name: lambda *_: None for name in ("synchronize", "empty_cache", "_sleep")}
    module.__dict__["cuda"] = types.SimpleNamespace(Event=Event, **no_ops)
    exec(compile(ast.Module(definitions, []), str(path), "exec"), module.__dict__)
    script.attach(module.__dict__, pacer)
    with contextlib.suppress(EnoughError):
        exec(compile(ast.Module(main.body, []), str(path), "exec"), module.__dict__)


@answers_bad_input
def main() -> int:
    """Run in a folder with cifar10/train.pt and test.pt, as the script's loader keeps them."""
    parser = arguments.parser("peer", __doc__)
    parser.add_argument("script", type=Path)
    parser.add_argument("--address", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--count", type=positive, required=True)
    parser.add_argument("--warm-up", type=positive, required=True)
    parser.add_argument("--turn", type=positive, required=True)
    parser.add_argument("--threads", type=positive, help="of torch; with it, the allocator is set as for our ranks")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        if args.device == "cpu":
            keep_memory()
    pacer = Pacer(args.address, args.name, args.device, args.turn)
    run(args.script, args.device, args.count, args.warm_up, pacer)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
