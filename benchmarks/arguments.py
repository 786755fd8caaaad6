"""The command lines of the benchmarks, which answer bad input as those of the trainer do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dist_train.command_line import Parser


def parser(name: str, description: str | None) -> Parser:
    """The parser of `python -m benchmarks.NAME`, for a main under `dist_train.command_line.command`."""
    return Parser(name, description, prog=f"python -m benchmarks.{name}")


def add_out(to: argparse.ArgumentParser) -> None:
    """Add the argument --out."""
    to.add_argument("--out", metavar="FILE", type=table_file, help="append the table to this file")


def table_file(text: str) -> Path:
    """The type of a file to append to, which is checked before hours of measuring. Raises
    argparse.ArgumentTypeError."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder; make it, or name a file elsewhere")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name a file elsewhere")
    return path


def positive_float(text: str) -> float:
    """The type of a number above zero. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number
