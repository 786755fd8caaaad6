"""The errors whose message is for the person who started the run, and the exit codes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

# Exit codes. The last is EX_TEMPFAIL of sysexits.h: the same command resumes.
DONE, FAILED, BAD_INPUT, NO_NETWORK, PREEMPTED = 0, 1, 2, 3, 75

_OUTCOMES = {DONE: "done", PREEMPTED: "preempted"}


def outcome_of(code: int) -> str:
    """How a training ended, by its exit code, in the word of its history: `done`, `preempted` or `failed`."""
    return _OUTCOMES.get(code, "failed")


def code_of(outcome: str) -> int:
    """A training's exit code by how it ended; FAILED for all but `done` and `preempted`."""
    return next((code for code, word in _OUTCOMES.items() if word == outcome), FAILED)


@dataclass
class Outcome:
    """How a run ends, known before its record is closed. detected_by: the ranks that detect the same bad input at this
    point: all of this `node`, `all` of the run, or perhaps only `one`."""

    code: int = FAILED
    reason: str = ""
    detected_by: Literal["node", "one", "all"] = "node"


class UserError(ValueError):
    """Bad input. The message is one sentence that names the setting, the value and the remedy. code: the exit code of
    a command that ends with it."""

    code: ClassVar[int] = BAD_INPUT


class DivergedError(ArithmeticError):
    """The loss or a gradient stopped being finite. The message names the step and what is left intact; details: the
    step and its microbatches with what is not finite, as JSON takes it. Raised on all ranks together."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class LostPeerError(ConnectionError):
    """Another rank died or hangs. The message names it and the step. reported_here: whether this rank is the one that
    prints it."""

    def __init__(self, message: str, reported_here: bool = True) -> None:
        super().__init__(message)
        self.reported_here = reported_here


def say(message: str) -> None:
    """Print a sentence for the user to stderr."""
    print(f"dist_train: {message}", file=sys.stderr, flush=True)
