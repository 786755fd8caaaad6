"""Signals that ask a run to stop, and the death of a rank's launcher."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import threading
from types import FrameType
from typing import Any

from dist_train.errors import LostPeerError

_LAUNCHER = os.getppid()  # at the first import of the package: it may end during the imports that take seconds
# sent by Slurm and submitit before a job's time limit or a preemption, by the launcher, and by Ctrl-C
SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# by a terminal that is closed, and by a launcher that has received it; nohup has it ignored, and so it stays
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    SIGNALS += (signal.SIGHUP,)


class StopRequest:
    """A context that handles stop signals. received: the number of the last one, 0 for none.

    A second Ctrl-C raises KeyboardInterrupt.
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
    """A stop signal was received before there was anything to save. name: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


class StopNow:
    """A context in which the first stop signal, also one that was held back before it, raises Stopped from the running
    code; later ones are ignored."""

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
        if self._received:  # again, in case the code inside has caught the exception
            raise Stopped(self._received) from None

    def _stop(self, number: int, _: FrameType | None) -> None:
        if not self._received:
            self._received = number
            raise Stopped(number)


def hold_back() -> None:
    """Block stop signals until StopNow is entered or `ended_within` is called."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def ended_within(seconds: float) -> bool:
    """Wait for a stop signal, and consume it. seconds: to wait at most. Returns whether one was received."""
    hold_back()
    return signal.sigtimedwait(SIGNALS, seconds) is not None


def ignore_at_exit() -> None:
    """Ignore stop signals once the interpreter shuts down. Python would restore their default action, with which a late
    signal ends a finished process as failed."""
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


def stop_with_launcher() -> None:
    """Have the kernel send SIGTERM to this rank when torchrun dies, which then cannot stop the rank itself. Without
    torchrun it does nothing. Raises LostPeerError when torchrun is dead already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    libc("prctl", 1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    if os.getppid() != _LAUNCHER:
        raise LostPeerError("the launcher has ended while this rank was starting")


def libc(function: str, *arguments: int) -> None:
    """Call a function of glibc; with another C library do nothing."""
    try:
        getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
    except (OSError, AttributeError):
        return
