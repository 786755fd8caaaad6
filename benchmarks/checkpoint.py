"""Measures the cost of a checkpoint for its step: written in a thread, and written in place.

    python -m benchmarks.checkpoint [--rounds 10]

Prints a Markdown row for each: median and quartiles of the seconds of a step of preset block94 on the CPU. The ways
take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import arguments
from benchmarks.table import spread
from dist_train import config
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import positive
from dist_train.errors import DONE
from dist_train.model.network import BlockNetwork
from dist_train.runs import checkpoint
from dist_train.training.optimizers import Optimizers

IMAGES = 250  # of one microbatch of the preset


@answers_bad_input
def main() -> int:
    parser = arguments.parser("checkpoint", __doc__)
    parser.add_argument("--rounds", type=positive, default=10)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    settings = config.load("block94", None, [])
    model = BlockNetwork(settings.model, (3, 32, 32), 10)
    optimizers = Optimizers(model, settings.optim, 1000)
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % 10
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizers.set_rates(1)
        optimizers.step(scaler)

    def state() -> dict[str, Any]:
        return {"step": 1, "model": model.state_dict(), "optimizers": optimizers.state()}

    step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        writer = checkpoint.Writer(path, 2, {}, before=lambda: None, written=lambda _: None, failed=lambda *_: None)
        kinds: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "in a thread": lambda: writer.write(1, state()),
            "in place": lambda: checkpoint.save(path, 1, state(), 2),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        calls: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, save in kinds.items():
                begin = time.perf_counter()
                save()
                saved = time.perf_counter()
                step()
                seconds[kind].append(time.perf_counter() - begin)
                calls[kind].append(saved - begin)
                writer.wait()
        size = next(path.glob("*.pt")).stat().st_size
    print(f"checkpoint of {size / 1e6:.1f} MB, step of {IMAGES} images on one thread, n = {rounds}\n")
    print(
        "| checkpoint | step, s: median (quartiles) | of it before computing, ms | ratio |\n| --- | --- | --- | --- |"
    )
    for kind, values in seconds.items():
        begins = 1000 * statistics.median(calls[kind])
        ratio = statistics.median(values) / statistics.median(seconds["none"])
        print(f"| {kind} | {spread(values, 3)} | {begins:.1f} | {ratio:.3f} |")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
