"""The trainer's arguments: their parser, and the configuration and the run folder that they give."""

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
    """The parser of `dist-train train`; it raises UserError for bad arguments."""
    train_parser = Parser(
        "train",
        DESCRIPTION,
        epilog=f"settings and their defaults, which a preset or a file may change:\n\n{config.reference()}",
    )
    train_parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"start from a preset: {', '.join(config.presets())} (default: block94, unless --config is given)",
    )
    train_parser.add_argument("--config", metavar="FILE", type=Path, help="a TOML file that overrides the preset")
    train_parser.add_argument("--run-dir", metavar="DIR", type=Path, help="run folder (default: runs/NAME-DIGEST)")
    train_parser.add_argument("--quiet", action="store_true", help="no progress bar and no table: record.quiet=true")
    train_parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override both")
    return train_parser


def resolve(args: argparse.Namespace) -> tuple[str, config.Config]:
    """The name for the run folder (of the preset, or of the file) and the configuration. Raises UserError."""
    preset = args.preset or (None if args.config else "block94")
    settings = [*args.settings, *(["record.quiet=true"] if args.quiet else [])]
    return preset or args.config.stem, config.load(preset, args.config, settings)


def default_run_dir(name: str, settings: config.Config) -> Path:
    """The run folder without --run-dir, named by the configuration, and in a W&B sweep also by the W&B run: members of
    a sweep may have the same configuration, and an agent that resumes a run has the same W&B run."""
    folder = f"{name}-seed{settings.train.seed}-{config.digest(settings)}"
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return Path("runs") / (f"sweep-{sweep}/{folder}-{run}" if sweep and run else folder)
