"""The errors whose message is for the person who started the run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")


class UserError(ValueError):
    """Bad input. The message is one sentence that names the setting, the value and the remedy."""


class DivergedError(ArithmeticError):
    """The loss or a gradient stopped being finite. The message names the step and what is left intact; details: the
    step and its microbatches with what is not finite, as JSON takes it. Raised on all ranks together."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class LostPeerError(ConnectionError):
    """Another rank died or hangs. The message names it and the step. speaks: whether this rank is the one to
    say so."""

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


def say(message: str) -> None:
    """Tell whoever started the run, in one sentence on stderr."""
    print(f"dist_train: {message}", file=sys.stderr, flush=True)


def command(main: Callable[P, int]) -> Callable[P, int]:
    """A command's `main`, which returns its exit code: bad input is said in its one sentence, and the code is 2."""

    @functools.wraps(main)
    def said(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            say(str(error))
            return 2

    return said
