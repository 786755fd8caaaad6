"""What all commands share: the argument parser, and the handling of bad input."""

from __future__ import annotations

import argparse
import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

from dist_train.errors import BAD_INPUT, FAILED, LostPeerError, UserError, reason, say, unusable

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
    """Decorate a command's `main`, which returns its exit code. Bad input is one sentence on stderr, from rank 0, and
    the error's exit code on every rank; so are files, folders and outputs that cannot be used. A reader that closes the
    pipe, such as `head`, ends the command in silence, with the code that a shell shows for SIGPIPE."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
        try:
            code = main(*args, **kwargs)
            print(end="", flush=True)
            return code
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                say(str(error))
            return error.code
        except LostPeerError as error:
            if error.reported_here:
                say(str(error))
            return FAILED
        except OSError as error:
            if error.errno is None:
                raise
            if error.filename is None:
                _close_output()
            if isinstance(error, BrokenPipeError):
                return 128 + signal.SIGPIPE
            say(unusable(error))
            return BAD_INPUT

    return wrapper


class _Log(io.FileIO):
    """An output that drops what cannot be written. number: of its descriptor. complain: called with the first error."""

    def __init__(self, number: int, complain: Callable[[OSError], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self._complain: Callable[[OSError], None] | None = complain

    def write(self, data: Any) -> int:
        try:
            written: int | None = super().write(data)
        except OSError as error:
            written, complain, self._complain = None, self._complain, None
            if complain:
                complain(error)
        return memoryview(data).nbytes if written is None else written


def survive_output() -> None:
    """Have stdout and stderr drop what they cannot take: a training goes on when its log is on a full disk, or when the
    reader of a pipe has ended."""

    def report(error: OSError) -> None:
        say(f"the output cannot be written ({reason(error)}) and is dropped; training continues")

    for number, complain in ((1, report), (2, lambda _: None)):
        stream = (sys.stdout, sys.stderr)[number - 1]
        if stream is None:  # closed: a file that is opened later must not get its number
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
        buffer = io.BufferedWriter(_Log(number, complain))
        encoding = stream.encoding if stream else "utf-8"
        text = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=number == 2 or buffer.raw.isatty())
        if number == 1:
            sys.stdout = text
        else:
            sys.stderr = text


def _close_output() -> None:
    """Drop what stdout could not take, which the interpreter would try to write again when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def positive(text: str) -> int:
    """The type of an argument that is a whole number above 0. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
