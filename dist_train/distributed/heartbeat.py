"""Heartbeats: a rank that died or hangs is noticed by its peers, and named with its step.

Every rank writes a heartbeat, with its progress, to the rendezvous store once a second. A rank reads those of the
others only when it waits for them too long, or when its connection to them is lost.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from dist_train.errors import LostPeerError, say

_BEAT = 1.0  # seconds between two heartbeats
_ANSWER = 5.0  # seconds until the store counts as gone
_SILENT = 3  # missing heartbeats in a row mean that a rank is gone
_STORE_TIMEOUT = timedelta(seconds=10)


class Heartbeat:
    """This rank's heartbeats, and its reading of the others'."""

    def __init__(self, rank: int, world_size: int, timeout: int) -> None:
        """Start, in a thread of its own. timeout: seconds to wait for a rank in one exchange."""
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.step = 0  # the step that is being computed, counted from 1; 0 before the first
        self.beats = self.exchanges = 0
        self.waiting_since: float | None = None
        self.failure = ""
        self.gone = False  # the store
        self.closed = threading.Event()
        self.lock = threading.Lock()
        # a connection of its own: that of the process group is blocked while it waits
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, None, False, _STORE_TIMEOUT, wait_for_workers=False)
        # A launcher's store outlives its trainers, so each round of them has names of its own. Where rank 0 holds the
        # store it is new with each round, and the launchers of several hosts do not agree on the number of restarts.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else ""
        self.store = PrefixStore(f"heartbeat/{attempt}", store)
        self._beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around every collective operation: the time in it is time spent waiting for others."""
        if self.waiting_since is not None:  # inside another
            yield
            return
        self.exchanges += 1
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None

    def close(self, failure: str = "") -> None:
        """End, and let the others know. failure: why this rank ends early, "" where it does not."""
        self.failure = failure
        self.closed.set()
        self._beat()

    def leave(self) -> None:
        """End because a peer is lost."""
        self.close()
        if self.rank == 0:
            time.sleep(2 * _BEAT)  # the store may go with this process, and others are just asking it

    def lost(self, error: BaseException) -> LostPeerError | None:
        """The peer that caused an error of a collective operation; None where none did. Takes a few seconds."""
        first = self._read()
        for _ in range(_SILENT if first is not None else 0):  # this rank's own heartbeat must not stop
            time.sleep(_BEAT)
            self._beat()
        second = self._read() if first is not None else None
        if first is None or second is None:
            return LostPeerError(
                f"rank {self.rank} on {platform.node()} lost its peers in step {self.step}: the rendezvous store at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer either ({_first_line(error)})"
            )
        waited = f" ({error})" if isinstance(error, TimeoutError) else ""
        here = f"rank {self.rank} was waiting for it in step {self.step}{waited}"
        ended = {rank: beat for rank, beat in second.items() if beat["ended"]}
        failed = {rank: beat for rank, beat in ended.items() if beat["failure"]}
        silent = {rank: beat for rank, beat in second.items() if beat == first.get(rank) and rank not in ended}
        for rank, beat in {**failed, **silent, **ended}.items():
            state = (
                f"has failed ({beat['failure']})" if beat["failure"] else "has ended" if beat["ended"] else "is gone"
            )
            if rank in silent or beat["failure"] or beat["exchanges"] < self.exchanges:
                return LostPeerError(f"{_place(rank, beat)} {state}; {here}", self._is_reporter({*failed, *silent}))
        behind = {rank: beat for rank, beat in second.items() if beat["exchanges"] < self.exchanges}
        for rank, beat in behind.items():
            hangs = f"{_place(rank, beat)} hangs, although its process lives; {here}"
            return LostPeerError(hangs, self._is_reporter(set(behind)))
        return None

    def _is_reporter(self, missing: set[int]) -> bool:
        """Whether this rank prints the message: the first of those that are left."""
        return self.rank == min(set(range(self.world_size)) - missing, default=self.rank)

    def _read(self) -> dict[int, dict[str, Any]] | None:
        """The last heartbeat of each other rank; None where the store does not answer."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        answers: list[dict[int, dict[str, Any]]] = []

        def ask() -> None:
            with suppress(RuntimeError), self.lock:
                there = [rank for rank in others if self.store.check([str(rank)])]
                answers.append({rank: json.loads(self.store.get(str(rank))) for rank in there})

        # The store's own timeout does not help: when its host lost its network, reading from it never ends.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER)
        return answers[0] if answers else None

    def _beat(self) -> None:
        self.beats += 1
        beat = {
            "number": self.beats,
            "step": self.step,
            "exchanges": self.exchanges,
            "host": platform.node(),
            "pid": os.getpid(),
            "ended": self.closed.is_set(),
            "failure": self.failure,
        }
        if self.gone or not self.lock.acquire(timeout=_BEAT):  # the store does not answer
            return
        try:
            self.store.set(str(self.rank), json.dumps(beat))
        except RuntimeError:  # the store went with its host; the exchanges will show it
            self.gone = True
        finally:
            self.lock.release()

    def _run(self) -> None:
        while not self.closed.wait(_BEAT):
            self._beat()
            since = self.waiting_since
            if since is None or time.monotonic() - since < self.timeout:
                continue
            # The main thread is inside the exchange and cannot be reached: the message and the end come from here.
            hung = TimeoutError(f"waited {self.timeout} s, train.timeout")
            error = self.lost(hung) or LostPeerError(
                f"the ranks lost contact in step {self.step}: each waits for the others, none is behind ({hung})"
            )
            if self.waiting_since != since:
                continue  # it came after all
            if error.reported_here:
                say(str(error))
            self.leave()
            os._exit(1)


def _place(rank: int, beat: dict[str, Any]) -> str:
    return f"rank {rank} (process {beat['pid']} on {beat['host']}, last seen in step {beat['step']})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
