"""All that is to be measured on a GPU, in one go of less than ten minutes.

    python -m benchmarks.gpu --out FOLDER [--data data/cifar10] [--airbench DIR] [--hiverge DIR] [--limit 570]

Runs the commands below one after the other, those first whose rows in RESULTS.md wait longest, writes what each prints
to a file of its own in FOLDER and the exit codes and seconds to FOLDER/report.md, and goes on when one fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.table import append, row
from dist_train.runs.run import Run

SEEDS = 3


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """By name, in the order in which they are run."""
    python = [sys.executable, "-m"]
    data = [f"data.dir={args.data}"]
    quiet = [*data, "record.wandb=disabled", "record.quiet=true"]
    main = [*python, "dist_train.main"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node=3", "-m", "dist_train.main"]
    peers = [f"--{name}={clone}" for name in ("airbench", "hiverge") if (clone := getattr(args, name))]

    def run(name: str, *settings: str, start: list[str] = main) -> dict[str, list[str]]:
        return {name: [*start, *quiet, *settings, "--run-dir", str(args.out / "runs" / name)]}

    found = run("block94") | run("compiled", "compile=true")
    # equal weights with several ranks, which share the GPU
    found |= run("shared", "train.backend=gloo", start=torchrun)
    if peers:
        found["speed"] = [*python, "benchmarks.speed", *peers, "--turn=5", *data]
        found["speed-compiled"] = [*python, "benchmarks.speed", *peers, "--turn=5", *data, "compile=true"]
    found["mixing"] = [*python, "benchmarks.mixing"]
    found["startup"] = [*python, "benchmarks.startup", "--ranks=1", "--cold", *data, "wandb=offline"]
    found |= run("not-deterministic", "train.deterministic=false")
    for seed in range(1, 1 + SEEDS):
        found |= run(f"block94-{seed}", f"seed={seed}", "compile=true")
    if args.airbench:
        found["speed-96"] = [*python, "benchmarks.speed", f"--airbench={args.airbench}", "--preset=block96", *data]
    for seed in range(SEEDS):
        found |= run(f"block96-{seed}", "--preset=block96", f"seed={seed}", "compile=true")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--airbench", type=Path)
    parser.add_argument("--hiverge", type=Path)
    parser.add_argument("--limit", type=float, default=570, help="seconds in all (default: 570)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report, end = args.out / "report.md", time.monotonic() + args.limit
    header = ["what", "exit code", "seconds", "test accuracy", "with TTA", "training, s", "images/s", "MFU", "weights"]
    append(report, row(header) + "\n" + row("---" for _ in header))
    for name, command in commands(args).items():
        begin = time.monotonic()
        with (args.out / f"{name}.txt").open("w") as log:
            try:
                left = max(1.0, end - begin)
                code = str(subprocess.run(command, stdout=log, stderr=log, timeout=left, check=False).returncode)
            except subprocess.TimeoutExpired:
                code = "out of time"
        line = row([name, code, f"{time.monotonic() - begin:.1f}", *_result(Run(args.out / "runs" / name))])
        append(report, line)
        print(line, flush=True)
        if time.monotonic() > end:
            break


def _result(run: Run) -> list[str]:
    if not run.done:
        return [""] * 6
    found = run.summary
    accuracies = [f"{100 * found[key]:.2f} %" if key in found else "" for key in ("test_accuracy", "test_accuracy_tta")]
    speed = [f"{found['train_seconds']:.2f}", f"{found['images_per_second']:,.0f}", f"{found['mfu']:.2f}"]
    return [*accuracies, *speed, found["weights_sha256"][:12]]


if __name__ == "__main__":
    main()
