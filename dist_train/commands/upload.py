"""Creates W&B runs from run folders, with what their trainings would have sent.

    dist-train upload runs/block94-seed0-1a2b3c4d
    dist-train upload runs/train-123/seed* --project again --offline

For runs that were trained without W&B, or whose W&B run is lost. Each becomes a new W&B run, with the curves, plots
and tables of its folder, and with the name, group, tags and choice of artifacts in its configuration.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from dist_train.command_line import Parser, command
from dist_train.tracking.upload import messages, send


def _parser() -> argparse.ArgumentParser:
    parser = Parser("upload", __doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="a run folder that no job is using")
    parser.add_argument("--project", metavar="NAME", help="W&B project (default: the one in its config.toml)")
    parser.add_argument("--entity", metavar="NAME", help="W&B user or team (default: your own)")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="write the W&B run to RUN_DIR/wandb, for wandb sync, instead of uploading it",
    )
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 not everything was sent, 2 bad input, before anything is
    sent."""
    args = _parser().parse_args(arguments)
    with ExitStack() as locks:
        runs = [(run_dir, messages(run_dir, args, locks)) for run_dir in args.run_dirs]
        return max([send(run_dir, messages) for run_dir, messages in runs])
