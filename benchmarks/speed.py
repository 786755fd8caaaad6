"""Measures the time of a training against that of other projects' scripts: on the same device, in one run, in turns.

    python -m benchmarks.speed --airbench DIR [--hiverge DIR] [--compile-peer] [--peer-as-is] [key=value ...]
    python -m benchmarks.speed --short [--airbench DIR]    # one line, from two steps of each kind
    python -m benchmarks.speed --one-rank     # ours on as many ranks as cores, against one rank of as many threads

DIR are clones of github.com/KellerJordan/cifar10-airbench and github.com/hiverge/cifar10-speedrun. Their scripts run
from the clones, unchanged on a GPU, with a few words replaced on a CPU (benchmarks/peer.py): airbench94_muon.py, or
airbench96_faster.py with --preset block96. Ours is dist_train.training.loop.train, under torchrun, on as many ranks of
one thread as there are cores, or on one GPU; key=value are its settings. All train on the images of our betons
(data.dir).

One program computes at a time: a step (or --turn of them) of one, then of another. A schedule has several kinds of
steps, by the images' size, by whether the stem still learns, and by how many images of a microbatch are trained on. The
first of each kind are not counted; --steps of each then are. A training takes the median of each kind times its number
in the whole schedule, added up. n counts turns. "CPU s", also a median, is of all threads and ranks, and nearly
independent of other load on the machine. The time in which the peers' loaders process all images at once for an epoch
is included; evaluation, checkpoints, the initial whitening and our metrics (one line a step) are not. The last line
printed also has our share of the matrix rate, which needs no peer: the schedule's operations a second over those of a
matrix product in this process, with a thread for each core.

On a CPU a peer runs eagerly, with a thread for each core, and with our allocator's settings; --compile-peer adds a row
with its own torch.compile, --peer-as-is one as its README starts it: compiled, and with nothing set. On a GPU it is
always started like that. More steps in a turn (--turn) reduce the time in which the device waits for the first of them.
All programs stay in memory: on a CPU about 5 GB for each peer, and 4 GB for two of our ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import arguments
from benchmarks.table import measured_on, publish, quartiles, spread, table
from benchmarks.turns import EnoughError, Pacer, Program, Step, take_turns
from dist_train import config, data_prep
from dist_train.command_line import Parser, positive
from dist_train.command_line import command as answers_bad_input
from dist_train.data.batches import Data, Microbatch
from dist_train.data.dataset import manifest, prepare
from dist_train.distributed.device import DTYPES, matrix_rate
from dist_train.distributed.launcher import ranks_per_node
from dist_train.distributed.ranks import join_ranks
from dist_train.errors import DONE, UserError
from dist_train.model.shapes import check_shapes
from dist_train.signals import StopRequest
from dist_train.training.loop import State, train
from dist_train.training.run_writer import Writer
from dist_train.training.schedule import kinds
from dist_train.training.selection import Selection
from dist_train.training.train import build_model

PEERS = {"block96": "airbench96_faster.py"}  # for all other presets: airbench94_muon.py
_ROOT = Path(__file__).resolve().parent.parent
_HEADER = ["what", "kind of step", "n", "s: median (quartiles)", "CPU s", "in a run", "training, s", "ours / this"]


class PacedData(Data):
    """Data whose steps wait for their turn, and that ends the training after enough of them. warm_up, counted: the
    numbers of steps before and while they are counted."""

    pacer: Pacer
    label: str
    warm_up: int
    counted: int

    def steps(self, first: int) -> Iterator[list[Microbatch]]:
        steps = super().steps(first)
        for number in range(self.warm_up + self.counted):
            self.pacer.step(self.label if number >= self.warm_up else None)
            yield next(steps)
        self.pacer.close()
        raise EnoughError


def run_rank(args: argparse.Namespace) -> None:
    """Run one of our ranks."""
    settings = config.load(args.preset, None, args.settings)
    t = settings.train
    # evaluate only after the last step, which is not reached
    settings = dataclasses.replace(settings, evaluate=dataclasses.replace(settings.evaluate, every=10**9))
    with join_ranks(t.device, t.threads, t.deterministic, t.timeout, t.backend) as ranks:
        data = PacedData(settings.data, t, manifest(settings.data), ranks)

        def new() -> State:
            return State.start(settings, build_model(settings, data).to(ranks.device), data.total_steps, data.images)

        state = new()
        model, optimizers = state.model, state.optimizers
        selection = Selection(t, data, model, state.losses)
        schedule = kinds(data, optimizers, selection)
        data.pacer, data.warm_up = Pacer(args.ours, args.name, ranks.device.type, args.turn), args.warm_up
        turns = -(-args.warm_up // args.turn) - (-args.steps // args.turn)
        flops = 0
        for kind, steps in schedule:
            image_flops = model.training_flops(kind.height, kind.width, kind.stem_learns)
            flops += len(steps) * (kind.kept * t.microbatches * image_flops + selection.flops(steps.start))
        data.pacer.plan({kind.label: len(steps) for kind, steps in schedule}, turns * len(schedule), flops)
        for kind, steps in schedule:
            data.label, data.counted = kind.label, min(args.steps, len(steps) - args.warm_up - 1)
            if data.counted < 1:
                raise UserError(f"{len(steps)} steps of the kind {kind.label} are too few to be measured")
            state = new()
            state.step = first_measured(steps, args.warm_up + data.counted, data.steps_per_epoch)
            with contextlib.suppress(EnoughError):
                train(settings, data, ranks, state, Writer(), StopRequest())
        data.pacer.done()


def first_measured(steps: range, count: int, per_epoch: int) -> int:
    """The step of a kind from which `count` are run: the first of an epoch where as many follow in it, since an epoch's
    last step also measures BatchNorm statistics, which are no part of a training's seconds; else the kind's first."""
    begin = -(-steps.start // per_epoch) * per_epoch
    return begin if begin + count < min(begin + per_epoch, steps.stop) else steps.start


def prepare_images(settings: config.Config, folder: Path) -> None:
    """Write the betons' images in the format of the peers' loaders."""
    classes = manifest(settings.data).classes
    folder.mkdir()
    for split in ("train", "test"):
        images, labels = (torch.from_numpy(array) for array in data_prep.read_split(settings.data.folder, split))
        torch.save({"images": images, "labels": labels, "classes": classes}, folder / f"{split}.pt")


def programs(args: argparse.Namespace, device: str, cores: int, work: Path) -> list[Program]:
    """Our program, and each peer in each way that the arguments select. work: folder of the logs and the images."""
    settings = config.load(args.preset, None, args.settings)
    address = str(work / "turns")
    numbers = ["--warm-up", str(args.warm_up), "--turn", str(args.turn)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    processes = ranks_per_node(settings.train.microbatches, cores) if device == "cpu" else 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    rank = ["-m", "benchmarks.speed", "--ours", address, "--steps", str(args.steps), "--preset", args.preset, *numbers]
    command = [sys.executable, *torchrun, *rank, *args.settings]
    started = [Program("ours", command, processes, work / "ours.log", environment)]
    if args.one_rank:
        name = f"ours, 1 rank of {cores} threads"
        command = [sys.executable, *rank, "--name", name, *args.settings, f"train.threads={cores}"]
        started.append(Program(name, command, 1, work / "one-rank.log", environment))
    ways = {"eager": device == "cpu", "compiled": device == "cpu" and args.compile_peer}
    ways["as is"] = device == "cuda" or args.peer_as_is
    for script in scripts(args):
        for way in [way for way, wanted in ways.items() if wanted]:
            name = f"{script.stem}, {way}"
            command = [sys.executable, "-m", "benchmarks.peer", str(script.resolve()), "--address", address]
            command += ["--name", name, "--device", device, "--count", str(args.steps), *numbers]
            command += [] if way == "as is" else ["--threads", str(cores)]
            own_environment = environment | ({"TORCHDYNAMO_DISABLE": "1"} if way == "eager" else {})
            started.append(Program(name, command, 1, work / f"{name}.log", own_environment, folder=work))
    return started


def scripts(args: argparse.Namespace) -> list[Path]:
    """The peers' scripts. Raises UserError for one that is missing."""
    paths = []
    if args.airbench:
        paths.append(args.airbench / PEERS.get(args.preset, "airbench94_muon.py"))
    if args.hiverge:
        paths.append(args.hiverge / "cifar10_speedrun.py")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; give the folder of the clone")
    return paths


def rows(measured: list[Program]) -> Iterator[list[str]]:
    """The rows of each program: one for every kind of step, and one for a whole training. The first program is ours."""
    ours = training_time(measured[0])
    for program in measured:
        for label, count in program.steps.items():
            steps = program.measured[label]
            seconds, cpu = [step.seconds for step in steps], statistics.median(step.cpu for step in steps)
            cells = [program.name, label, f"{len(steps)}", spread(seconds, 4), f"{cpu:.4f}", f"{count}"]
            yield [*cells, f"{count * statistics.median(seconds):.2f}", ""]
        low, middle, high, cpu = training_time(program)
        ratio = "" if program is measured[0] else f"**{ours[1] / middle:.3f}** (CPU {ours[3] / cpu:.3f})"
        name = f"**{program.name}**"
        yield [name, "training", "", "", f"{cpu:.1f}", "", f"**{middle:.2f}** ({low:.2f}..{high:.2f})", ratio]


def training_time(program: Program) -> tuple[float, float, float, float]:
    """Seconds of a whole training if every step took the lower quartile, the median, the upper quartile of its kind;
    and seconds of CPU, by the medians."""
    low = middle = high = cpu = 0.0
    for label, count in program.steps.items():
        steps = program.measured[label]
        quarter, half, three = quartiles([step.seconds for step in steps])
        low, middle, high = low + count * quarter, middle + count * half, high + count * three
        cpu += count * statistics.median(step.cpu for step in steps)
    return low, middle, high, cpu


def one_line(measured: list[Program], preset: str, rate: float) -> str:
    """The result in one line. rate: operations a second of a matrix product."""
    seconds = training_time(measured[0])[1]
    words = [
        f"torch {torch.__version__}: {preset} trains in {seconds:.0f} s, at {measured[0].flops / seconds / rate:.2f} "
    ]
    words.append(f"of the matrix rate of {rate / 1e9:,.0f} GFLOP/s")
    words += [f"; {seconds / training_time(peer)[1]:.3f} of the time of {peer.name}" for peer in measured[1:]]
    return "".join(words)


def print_turn(name: str, label: str, step: Step) -> None:
    print(f"{name}: {label}: {step.seconds:.3f} s", file=sys.stderr, flush=True)


def commit_of(clone: Path) -> str:
    """The name and the commit of a clone."""
    git = ["git", "-C", str(clone), "log", "-1", "--format=%h"]
    commit = subprocess.run(git, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout.strip()
    return f"{clone.resolve().name} at {commit or 'no commit'}"


def _parser() -> Parser:
    parser = arguments.parser("speed", __doc__)
    parser.add_argument("--airbench", metavar="DIR", type=Path, help="clone of cifar10-airbench")
    parser.add_argument("--hiverge", metavar="DIR", type=Path, help="clone of cifar10-speedrun")
    parser.add_argument("--preset", default="block94", help="of our training (default: block94)")
    parser.add_argument("--short", action="store_true", help="print the last line only; 2 steps, and 1 to warm up")
    parser.add_argument("--steps", metavar="N", type=positive, help="steps of each kind to count (default: 10)")
    parser.add_argument(
        "--warm-up", metavar="N", type=positive, help="steps of each kind before (default: 2, on a GPU 5)"
    )
    parser.add_argument("--turn", metavar="N", type=positive, default=1, help="steps in one turn (default: 1)")
    parser.add_argument("--compile-peer", action="store_true", help="add a row with the peer's own torch.compile")
    parser.add_argument("--peer-as-is", action="store_true", help="add a row as the peer's README starts it")
    arguments.add_out(parser)
    parser.add_argument(
        "--one-rank", action="store_true", help="add a row of ours on one rank with a thread for each core"
    )
    parser.add_argument("--name", default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--ours", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings over our preset")
    return parser


@answers_bad_input
def main() -> int:
    args = _parser().parse_intermixed_args()
    if args.ours:
        run_rank(args)
        sys.stdout.flush()
        os._exit(0)  # as dist_train.main does
    settings = config.load(args.preset, None, args.settings)
    scripts(args)  # raises UserError where one is missing
    device = "cuda" if settings.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    check_shapes(settings, prepare(settings.data).image_shape)  # writes the betons where they are missing
    args.steps = args.steps or (2 if args.short else 10)
    args.warm_up = args.warm_up or (5 if device == "cuda" else 1 if args.short else 2)
    cores = len(os.sched_getaffinity(0))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the programs end with this one
    with tempfile.TemporaryDirectory() as folder:
        prepare_images(settings, Path(folder) / "cifar10")
        started = programs(args, device, cores, Path(folder))
        take_turns(started, Path(folder) / "turns", print_turn)
    torch.set_num_threads(cores)
    rate = matrix_rate(torch.device(device), DTYPES[settings.train.precision])
    line = one_line(started, args.preset, rate)
    if args.short:
        print(line)
        return DONE
    clones = [commit_of(clone) for clone in (args.airbench, args.hiverge) if clone]
    conditions = measured_on(torch.device(device), cores, *clones)
    publish("benchmarks.speed", conditions, f"{table(_HEADER, rows(started))}\n\n{line}", args.out)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
