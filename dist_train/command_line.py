"""What all commands share: the argument parser, and the handling of bad input and of output that nobody reads."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from dist_train.errors import (
    BAD_INPUT,
    FAILED,
    DeviceError,
    LauncherError,
    LostPeerError,
    UserError,
    needs_memory,
    reason,
    say,
    shortage,
    unusable,
)

P = ParamSpec("P")
MOST = 100_000  # more than any count of a command: pictures in a batch, nodes, blocks, pixels of a side


class Parser(argparse.ArgumentParser):
    """The parser of `dist-train NAME`, or of `prog`. description: the module's docstring, shown unchanged."""

    def __init__(self, name: str, description: str | None, prog: str | None = None, **options: Any) -> None:
        super().__init__(
            prog=prog or f"dist-train {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.register("type", None, _text)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does. Raises UserError for bad arguments, empty ones included."""
        return super().parse_known_args(self._given(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does. Raises UserError for bad arguments, empty ones included."""
        return super().parse_known_intermixed_args(self._given(args), namespace)

    def _given(self, args: Sequence[str] | None) -> list[str]:
        """The arguments, none of which is empty: an empty path would be the current folder, an empty name the default,
        and is mostly a shell variable that is not set. Raises UserError."""
        given = [*(sys.argv[1:] if args is None else args)]
        for before, argument in zip([self.prog, *given], given, strict=False):
            option, _, value = argument.partition("=")
            if not argument.strip():
                self.error(f'{before} "": an empty argument; give it a value, or remove it')
            if option.startswith("--") and argument != option and not value.strip():
                self.error(f"{argument}: an empty value; give one, or remove {option}")
        return given

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def is_text(argument: str) -> bool:
    """Whether an argument is valid UTF-8: Python reads other bytes as surrogates, which only file names may have."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def check_path(what: str, path: Path) -> None:
    """Raises UserError for a path to write to that is not UTF-8, which W&B, safetensors and others do not take. what:
    the option or the argument."""
    if not is_text(str(path.absolute())):
        raise UserError(f"{what} {path}: its path is not UTF-8; rename the folder, or name another")


def _text(argument: str) -> str:
    """The type of an argument that has no other, and is not a path. Raises argparse.ArgumentTypeError."""
    if not is_text(argument):
        raise argparse.ArgumentTypeError(f"{argument} is not UTF-8")
    return argument


def use_utf8() -> None:
    """Called by a process for its own command line, before anything else: file names, arguments and text are UTF-8 in
    any locale, and stdout escapes what it cannot show.

    Where the locale has another encoding, the process starts its command again in Python's UTF-8 mode, which its child
    processes inherit."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate a command's `main`, which returns its exit code, and reads the process's arguments where it gets none.

    Bad input is one sentence on stderr, from rank 0 (on a LauncherError from every rank), and the error's exit code on
    every rank; so are files, folders and outputs that cannot be used. Where memory is too small, each rank says so and
    returns FAILED. A reader that closes the pipe, such as `head`, ends the command in silence, with the code that a
    shell shows for SIGPIPE."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        if not args:
            use_utf8()
        try:
            code = main(*args, **kwargs)
            if sys.stdout:
                sys.stdout.flush()
            return code
        except UserError as error:
            if os.environ.get("RANK", "0") == "0" or isinstance(error, LauncherError):
                say(str(error))
            return error.code
        except (MemoryError, RuntimeError) as error:
            if not needs_memory(error):
                raise
            say(f"not enough memory ({shortage(error)}); compute on fewer images at a time, or on another machine")
            return FAILED
        except DeviceError as error:
            say(str(error))
            return FAILED
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
    """Have stdout and stderr drop what they cannot take: a training continues when its log is on a full disk, or when
    the reader of a pipe has ended."""

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


def count(text: str, least: int = 0, most: int = MOST) -> int:
    """The type of an argument that is a whole number from `least` to `most`, which has at most nine digits. Raises
    argparse.ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {most}")
    return int(text)


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1 to MOST. Raises argparse.ArgumentTypeError."""
    return count(text, 1)
