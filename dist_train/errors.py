"""The errors whose message is for the user, the exit codes, and the printing of lines."""

from __future__ import annotations

import errno
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

# Exit codes. PREEMPTED is EX_TEMPFAIL of sysexits.h: the same command resumes the run.
DONE, FAILED, BAD_INPUT, NO_NETWORK, PREEMPTED = 0, 1, 2, 3, 75
_OUTCOMES = {DONE: "done", PREEMPTED: "preempted"}
# Unicode's classes of the characters that `printable` escapes
_CONTROL = ("Cc", "Cs", "Zl", "Zp")
_DIRECTION = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def outcome_of(code: int) -> str:
    """How a training with this exit code ended, as in `history.jsonl`: `done`, `preempted` or `failed`."""
    return _OUTCOMES.get(code, "failed")


def code_of(outcome: str) -> int:
    """The exit code of a training with this outcome; FAILED for all but `done` and `preempted`."""
    return next((code for code, word in _OUTCOMES.items() if word == outcome), FAILED)


@dataclass
class Outcome:
    """How a run ends, set before its files are closed. code: the exit code. reason: in words. detected_by: the ranks
    that detect the same bad input at this point: all of this `node`, or `all` of the run."""

    code: int = FAILED
    reason: str = ""
    detected_by: Literal["node", "all"] = "node"


class UserError(ValueError):
    """Bad input. The message is one sentence with the setting, its value and the remedy. code: the exit code of a
    command that fails with it."""

    code: ClassVar[int] = BAD_INPUT


class NotFiniteError(UserError):
    """A network has weights or gives results that are not finite. The message names them."""


class LauncherError(UserError):
    """Bad input in a launcher's variables. Each rank that has them reports it, since they do not tell which it is."""


class DivergedError(ArithmeticError):
    """A loss, a gradient, a weight or a result of the evaluation is not finite. The message names the step and the last
    checkpoint; details: the step and, of losses and gradients, its microbatches with the values that are not finite,
    for JSON. Raised on all ranks together."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class LostPeerError(ConnectionError):
    """Another rank died or hangs. The message names the rank and the step. reported_here: whether this rank is the one
    that prints it."""

    def __init__(self, message: str, reported_here: bool = True) -> None:
        super().__init__(message)
        self.reported_here = reported_here


class DeviceError(Exception):
    """The GPU of a rank failed. The message names the rank and the GPU."""


def damaged(path: Path, why: str, remedy: str = "omit this run") -> UserError:
    """The error for a file of a run whose contents are not valid. why: the reason, in words."""
    return UserError(f"{path} is damaged, or of another version ({why}); restore the original file, or {remedy}")


def unreadable(path: Path, error: OSError, remedy: str = "omit this run") -> UserError:
    """The error for a file of a run that cannot be read."""
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or {remedy}")


def needs_memory(error: BaseException) -> bool:
    """Whether memory could not be had: Python's and numpy's error, and torch's for a CPU and for a GPU."""
    words = "can't allocate memory|out of memory|_ALLOC_FAILED"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error))))


def shortage(error: BaseException) -> str:
    """The memory that could not be had, in the words of the error, without torch's account of its own and its
    advice."""
    return first_line(error).partition(" Of the allocated memory")[0].rstrip(".")


class LostRecordError(Exception):
    """The file of the metrics, or its folder, was moved or deleted while a run wrote to it. The message is for the
    user."""


def printable(text: str) -> str:
    """Text as a part of one line of a terminal, from names that may have any character: line breaks, other control
    characters, bytes that are not text, and marks that change the direction of writing become escapes such as
    `\\x1b`."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _CONTROL or unicodedata.bidirectional(character) in _DIRECTION
        else character
        for character in text
    )


def show(*lines: str, stream: TextIO | None = None) -> None:
    """Print lines to stdout, or to another stream, in place of a progress bar, which is drawn again with its next step.
    Everything that may have a name of the user's, or a text of a file, is printed by this function."""
    stream = stream or sys.stdout
    if sys.stderr.isatty():  # where the bar is, of this process or of the one that started it
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    encoding = stream.encoding or "utf-8"
    text = "\n".join(map(printable, lines)).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream, flush=True)


def say(message: str, program: str = "dist_train") -> None:
    """Print a sentence for the user to stderr. program: the part of the project that says it."""
    show(f"{program}: {message}", stream=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cause(error: BaseException) -> str:
    """The last line of an error's message, where libraries that wrap each other's errors say what happened, without the
    place in their code and their advice."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return re.split(r"\. (?=[A-Z])", re.sub(r"^\[\S+:\d+\] ", "", line.strip()))[0].rstrip(".")


_REMEDIES = {
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.ENOSPC: "make room, or name another",
    errno.EDQUOT: "make room, or name another",
    errno.ENAMETOOLONG: "name a shorter one",
}


def unusable(error: OSError) -> str:
    """The sentence on a file or folder of the user, or an output, that the operating system does not let us use."""
    if error.filename is None:
        return f"the output cannot be written ({reason(error)}); send it somewhere else"
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else f"file {error.filename}"
    return f"{name}: cannot be used ({reason(error)}); {_REMEDIES.get(error.errno or 0, 'name another')}"


def reason(error: BaseException) -> str:
    """Why something failed, for a sentence that names the file: of an error of the operating system without its number
    and its file."""
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
