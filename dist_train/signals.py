"""Signals that ask a run to stop, and the bond between a rank and its launcher."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import threading
from types import FrameType
from typing import Any

from dist_train.errors import LostPeerError

_LAUNCHER = os.getppid()  # at the first import of the package: it may die during those that take seconds
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


class Stopped(BaseException):
    """A stop signal came before there was anything to be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


class StopNow:
    """While it is entered, the first stop signal, also one that was held back, raises Stopped from whatever is being
    done; later ones are ignored."""

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._received:  # whatever became of the exception, for example in an import
            raise Stopped(self._received) from None

    def _stop(self, number: int, _: FrameType | None) -> None:
        if not self._received:
            self._received = number
            raise Stopped(number)


def hold_back() -> None:
    """Have stop signals wait until StopNow is entered, or for `ended_within`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def ended_within(seconds: float) -> bool:
    """Wait for a stop signal, and take it. Returns whether one came."""
    hold_back()
    return signal.sigtimedwait(SIGNALS, seconds) is not None


def ignore_at_exit() -> None:
    """From the interpreter's end on, stop signals are too late: they are ignored. Python itself would set them back to
    what they do of old, which is to end the process as failed."""
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


def stop_with_launcher() -> None:
    """Ask the kernel for the stop signal when torchrun dies: it could no longer stop this rank itself. Raises
    LostPeerError when it is dead already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    libc("prctl", 1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    if os.getppid() != _LAUNCHER:
        raise LostPeerError("the launcher has ended while this rank was starting")


def libc(function: str, *arguments: int) -> None:
    """Call a function of glibc; with another C library do without."""
    try:
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
    except (OSError, AttributeError):
        return
