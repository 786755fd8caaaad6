"""Runs all measurements on a GPU, in less than ten minutes.

    python -m benchmarks.gpu --out FOLDER [--data data/cifar10] [--airbench DIR] [--hiverge DIR] [--limit 570]

Runs the commands below one after the other, beginning with those whose rows in RESULTS.md are oldest. Writes the output
of each to its own file in FOLDER, and exit codes and seconds to FOLDER/report.md. When one fails, the next ones still
run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import arguments
from benchmarks.table import append, row
from dist_train.command_line import command as answers_bad_input
from dist_train.errors import DONE, UserError
from dist_train.runs.run import Run

SEEDS = 3


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The commands by name, in the order in which they are run."""
    python = [sys.executable, "-m"]
    data = [f"data.dir={args.data}"]
    quiet = [*data, "record.wandb=disabled", "record.quiet=true"]
    main = [*python, "dist_train.main"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "-m", "dist_train.main"]
    peers = [f"--{name}={clone}" for name in ("airbench", "hiverge") if (clone := getattr(args, name))]

    def run(name: str, *settings: str, start: list[str] = main) -> dict[str, list[str]]:
        return {name: [*start, *quiet, *settings, "--run-dir", str(args.out / "runs" / name)]}

    by_name = run("block94") | run("launched", "cuda_graphs=false") | run("compiled", "compile=true")
    # several ranks share the GPU, and must give the same weights as one
    for ranks in (2, 3):
        for name, settings in (("", []), ("-compiled", ["compile=true"])):
            start = [*torchrun[:-2], f"--nproc_per_node={ranks}", *torchrun[-2:]]
            by_name |= run(f"shared-{ranks}{name}", "train.backend=gloo", *settings, start=start)
    if peers:
        by_name["speed"] = [*python, "benchmarks.speed", *peers, "--turn=5", *data]
        by_name["speed-compiled"] = [*python, "benchmarks.speed", *peers, "--turn=5", *data, "compile=true"]
    by_name["mixing"] = [*python, "benchmarks.mixing"]
    by_name["startup"] = [*python, "benchmarks.startup", "--ranks=1", "--cold", *data, "wandb=offline"]
    by_name |= run("not-deterministic", "train.deterministic=false")
    for seed in range(1, 1 + SEEDS):
        by_name |= run(f"block94-{seed}", f"seed={seed}", "compile=true")
    for seed in range(SEEDS):
        by_name |= run(f"block95-{seed}", "--preset=block95", f"seed={seed}")
    if args.airbench:
        by_name["speed-96"] = [*python, "benchmarks.speed", f"--airbench={args.airbench}", "--preset=block96", *data]
    for seed in range(SEEDS):
        by_name |= run(f"block96-{seed}", "--preset=block96", f"seed={seed}", "compile=true")
    return by_name


@answers_bad_input
def main() -> int:
    parser = arguments.parser("gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--airbench", type=Path)
    parser.add_argument("--hiverge", type=Path)
    parser.add_argument("--limit", type=arguments.positive_float, default=570, help="seconds in all (default: 570)")
    args = parser.parse_args()
    if absent := [clone for clone in (args.airbench, args.hiverge) if clone and not clone.is_dir()]:
        raise UserError(f"{absent[0]} is not a folder; give the folder of the clone")
    args.out.mkdir(parents=True, exist_ok=True)
    report, end = args.out / "report.md", time.monotonic() + args.limit
    header = ["what", "exit code", "seconds", "test accuracy", "with TTA", "training, s", "images/s", "MFU", "weights"]
    append(report, row(header) + "\n" + row("---" for _ in header))
    for name, command in commands(args).items():
        begin = time.monotonic()
        with (args.out / f"{name}.txt").open("w", encoding="utf-8") as log:
            try:
                remaining = max(1.0, end - begin)
                code = str(subprocess.run(command, stdout=log, stderr=log, timeout=remaining, check=False).returncode)
            except subprocess.TimeoutExpired:
                code = "out of time"
        line = row([name, code, f"{time.monotonic() - begin:.1f}", *_result(Run(args.out / "runs" / name))])
        append(report, line)
        print(line, flush=True)
        if time.monotonic() > end:
            break
    return DONE


def _result(run: Run) -> list[str]:
    """The cells of a run's results, empty for a run that is not done."""
    if not run.done:
        return [""] * 6
    summary = run.summary
    accuracies = [
        f"{100 * summary[key]:.2f} %" if key in summary else "" for key in ("test_accuracy", "test_accuracy_tta")
    ]
    speed = [f"{summary['train_seconds']:.2f}", f"{summary['images_per_second']:,.0f}", f"{summary['mfu']:.2f}"]
    return [*accuracies, *speed, summary["weights_sha256"][:12]]


if __name__ == "__main__":
    sys.exit(main())
