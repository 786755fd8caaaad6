"""Signals that ask a run to stop: noted when they come, obeyed at the end of a step."""

from __future__ import annotations

import atexit
import signal
import threading
from types import FrameType
from typing import Any

# Slurm's and submitit's at the end of the allocation, the launcher's, the keyboard's
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """While it is entered, `received` is the number of the stop signal that came, 0 before.

    A second Ctrl-C ends the process at once; what was saved stays.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class StopNow:
    """While it is entered, the first stop signal raises Stopped from whatever is being done, and `received` is its
    number; later ones are ignored. There is nothing to be saved yet."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopNow:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received = number
            raise Stopped


class Stopped(BaseException):
    """A stop signal came."""


def ignore_at_exit() -> None:
    """From the interpreter's end on, stop signals are too late: they are ignored. Python itself would set them back to
    what they do of old, which is to end the process as failed."""
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])
