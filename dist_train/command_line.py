"""What all commands share: the argument parser, and the handling of bad input and of output that nobody reads."""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, ParamSpec

from dist_train.errors import LauncherError, UserError, say

P = ParamSpec("P")


class Parser(argparse.ArgumentParser):
    """The parser of `dist-train NAME`. description: the module's docstring, shown unchanged."""

    def __init__(self, name: str, description: str | None, **options: Any) -> None:
        super().__init__(
            prog=f"dist-train {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate a command's `main`, which returns its exit code: on a UserError rank 0 prints the message to stderr (on
    a LauncherError every rank does), and each returns the error's exit code."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("RANK", "0") == "0" or isinstance(error, LauncherError):
                say(str(error))
            return error.code

    return wrapper


class _Lasting(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)


def outlive_readers() -> None:
    """Have nothing fail because stdout or stderr cannot be written: the terminal was closed, the reader of a pipe has
    ended, or the disk that holds a log is full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # else it is closed
            stream.flush()
            raw = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
            lasting = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, lasting)


def positive(text: str) -> int:
    """The type of an argument that is a whole number above 0. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
