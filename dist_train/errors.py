"""The errors whose message is for the user, and the exit codes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

# Exit codes. PREEMPTED is EX_TEMPFAIL of sysexits.h: the same command resumes the run.
DONE, FAILED, BAD_INPUT, NO_NETWORK, PREEMPTED = 0, 1, 2, 3, 75
_OUTCOMES = {DONE: "done", PREEMPTED: "preempted"}


def outcome_of(code: int) -> str:
    """How a training with this exit code ended, as in `history.jsonl`: `done`, `preempted` or `failed`."""
    return _OUTCOMES.get(code, "failed")


def code_of(outcome: str) -> int:
    """The exit code of a training with this outcome; FAILED for all but `done` and `preempted`."""
    return next((code for code, word in _OUTCOMES.items() if word == outcome), FAILED)


@dataclass
class Outcome:
    """How a run ends, set before its files are closed. code: the exit code. reason: in words. detected_by: the ranks
    that detect the same bad input at this point: all of this `node`, `all` of the run, or perhaps only `one`."""

    code: int = FAILED
    reason: str = ""
    detected_by: Literal["node", "one", "all"] = "node"


class UserError(ValueError):
    """Bad input. The message is one sentence with the setting, its value and the remedy. code: the exit code of a
    command that fails with it."""

    code: ClassVar[int] = BAD_INPUT


class LauncherError(UserError):
    """Bad input in a launcher's variables. Each rank that has them reports it, since they do not tell which it is."""


class DivergedError(ArithmeticError):
    """The loss or a gradient is not finite. The message names the step and the last checkpoint; details: the step and
    its microbatches with the values that are not finite, for JSON. Raised on all ranks together."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class LostPeerError(ConnectionError):
    """Another rank died or hangs. The message names the rank and the step. reported_here: whether this rank is the one
    that prints it."""

    def __init__(self, message: str, reported_here: bool = True) -> None:
        super().__init__(message)
        self.reported_here = reported_here


def say(message: str) -> None:
    """Print a sentence for the user to stderr."""
    print(f"dist_train: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
