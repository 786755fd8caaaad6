"""The trainer's arguments: their parser, and the configuration and the run folder that they ask for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dist_train import config
from dist_train.command_line import Parser

DESCRIPTION = """Train a block network.

    torchrun --nproc_per_node=4 -m dist_train.main --preset block94
    dist-train train --preset digits train.epochs=4 seed=1

Started again with the same run folder it resumes; without --run-dir the folder is named by the configuration, so that
the same command resumes where it was stopped. Settings are key=value with the names of config.toml; the last part of a
name is enough where it is unambiguous.
"""


def parser() -> argparse.ArgumentParser:
    described = Parser(
        "train",
        DESCRIPTION,
        epilog=f"settings and their defaults, which a preset or a file may change:\n\n{config.reference()}",
    )
    described.add_argument(
        "--preset",
        metavar="NAME",
        help=f"start from a preset: {', '.join(config.presets())} (default: block94, unless --config is given)",
    )
    described.add_argument("--config", metavar="FILE", type=Path, help="a TOML file over the preset")
    described.add_argument("--run-dir", metavar="DIR", type=Path, help="run folder (default: runs/NAME-DIGEST)")
    described.add_argument("--quiet", action="store_true", help="no progress bar and no table: record.quiet=true")
    described.add_argument("settings", metavar="key=value", nargs="*", help="settings over both")
    return described


def resolve(args: argparse.Namespace) -> tuple[str, config.Config]:
    """The name and the configuration that the command line asks for. Raises UserError."""
    preset = args.preset or (None if args.config else "block94")
    settings = [*args.settings, *(["record.quiet=true"] if args.quiet else [])]
    return preset or args.config.stem, config.load(preset, args.config, settings)


def default_run_dir(name: str, settings: config.Config) -> Path:
    """The run folder where none is given, named by the configuration, and in a W&B sweep by the agent's run too: its
    members may have one configuration, and an agent that goes on with a run has the same."""
    folder = f"{name}-seed{settings.train.seed}-{config.digest(settings)}"
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return Path("runs") / (f"sweep-{sweep}/{folder}-{run}" if sweep and run else folder)
