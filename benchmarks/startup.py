"""Measures the seconds from the command to the end of the first step, by part.

    python -m benchmarks.startup [--ranks 2] [--rounds 3] [--cold] [--out FILE] [trainer arguments]

The trainer runs with a clock around its parts, and is stopped after the first step. `--cold` empties the page cache
before each start (as root), and gives each start its own compile cache. Rank 0 is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import arguments
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import positive
from dist_train.config.arguments import parser as trainer_parser
from dist_train.config.arguments import resolve
from dist_train.errors import DONE

PARTS = {
    "launcher": "until the rank's process starts: torchrun",
    "imports": "Python, torch, this package",
    "process group": "the ranks find each other",
    "data": "betons checked and read onto the device",
    "model": "network, whitening, optimizers",
    "record": "run folder, W&B's process",
    "DDP": "wrapping the network; on a GPU recording CUDA graphs, with their compilation",
    "warm-up": "each kind of step once, on a copy; on a CPU with its compilation",
    "first step": "its computing",
    "rest": "configuration, checks, the matrix product for MFU, exchange between ranks",
}


@answers_bad_input
def main() -> int:
    parser = arguments.parser("startup", __doc__)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--cold", action="store_true")
    arguments.add_out(parser)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args, trainer = parser.parse_known_args()
    if args.child:
        _child(args.child, trainer)
        return DONE
    resolve(trainer_parser().parse_intermixed_args(trainer))  # raises UserError
    rows: list[dict[str, float]] = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_start(Path(folder), args.ranks, args.cold, trainer))
    import torch

    from benchmarks.table import measured_on, publish, spread, table

    head = ["part", "seconds, median (quartiles)", "what"]
    total = {"sum": "command to the end of the first step"}
    markdown = table(
        head, [[part, spread([row[part] for row in rows], 2), what] for part, what in {**PARTS, **total}.items()]
    )
    kind = "cold" if args.cold else "warm"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = measured_on(device, os.cpu_count() or 1)
    publish("benchmarks.startup", f"{kind} caches, n = {args.rounds}; {conditions}", markdown, args.out)
    return DONE


def _start(folder: Path, ranks: int, cold: bool, trainer: list[str]) -> dict[str, float]:
    """The seconds of one start by part, and their sum."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if cold:
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="utf-8")
        environment |= {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    out = folder / "seconds.json"
    launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launch, "benchmarks.startup", "--child", out, *trainer]
    command += ["--run-dir", folder / "run", "log_every=1", "record.quiet=true"]
    begin = time.time()
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if not out.exists():
        sys.exit(done.stderr)
    row: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    row["launcher"] = row.pop("started") - begin
    row["sum"] = row.pop("ended") - begin
    row["rest"] = row["sum"] - sum(row.get(part, 0.0) for part in PARTS)
    return {part: row.get(part, 0.0) for part in (*PARTS, "sum")}


def _child(out: Path, trainer: list[str]) -> None:
    """Run the trainer as a rank, and write its seconds by part to `out`."""
    boot = time.time() - float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    started = boot + ticks / os.sysconf("SC_CLK_TCK")
    import torch.distributed

    from dist_train import main
    from dist_train.data import dataset
    from dist_train.training import loop, recorder, step_log, train

    seconds = {"started": started, "imports": time.time() - started}
    open_parts: list[str] = []

    def timed(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.time()
            open_parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                open_parts.pop()
                spent = time.time() - begin
                seconds[part] = seconds.get(part, 0.0) + spent
                if open_parts:  # counted once, in the innermost part
                    seconds[open_parts[-1]] = seconds.get(open_parts[-1], 0.0) - spent

        setattr(owner, name, call)

    timed(torch.distributed, "init_process_group", "process group")
    timed(dataset, "prepare", "data")
    timed(train, "Data", "data")
    timed(train, "build_model", "model")
    timed(loop, "Optimizers", "model")
    for name in ("open_folder", "RunWriter"):
        timed(train, name, "record")
    timed(train, "warm_up", "warm-up")
    timed(loop, "TrainStep", "DDP")

    step = recorder.Recorder.step
    begin = step_log.StepLog.__init__

    def begins(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        seconds["begun"] = time.time()

    def ends(self: Any, **values: Any) -> None:
        step(self, **values)
        seconds["ended"] = time.time()
        seconds["first step"] = seconds["ended"] - seconds.pop("begun")
        out.write_text(json.dumps(seconds), encoding="utf-8")
        os._exit(0)  # the launcher ends the other ranks

    step_log.StepLog.__init__ = begins  # type: ignore[method-assign]
    recorder.Recorder.step = ends  # type: ignore[method-assign]
    main.main(trainer)


if __name__ == "__main__":
    sys.exit(main())
