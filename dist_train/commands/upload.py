"""W&B runs made from the records of run folders, as their trainings would have sent them.

    dist-train upload runs/block94-seed0-1a2b3c4d
    dist-train upload runs/train-123/seed* --project again --offline

For runs that were trained without W&B, or whose W&B run is lost. Each becomes a new W&B run, with the curves, plots
and tables that its folder holds, and with the name, group, tags and choice of artifacts in its configuration.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from dist_train.command_line import Parser, command
from dist_train.tracking.upload import messages, send


def parser() -> argparse.ArgumentParser:
    described = Parser("upload", __doc__)
    described.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="a run folder that no job holds")
    described.add_argument("--project", metavar="NAME", help="W&B project (default: the one in its config.toml)")
    described.add_argument("--entity", metavar="NAME", help="W&B user or team (default: your own)")
    described.add_argument(
        "--offline", action="store_true", help="write it to RUN_DIR/wandb, for wandb sync, instead of uploading it"
    )
    return described


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 not all of it, 2 bad input, before anything is sent."""
    args = parser().parse_args(arguments)
    with ExitStack() as held:
        runs = [(run_dir, messages(run_dir, args, held)) for run_dir in args.run_dirs]
        return max([send(run_dir, messages) for run_dir, messages in runs])
