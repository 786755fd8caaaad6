"""Heartbeats: the peers of a rank that died or hangs detect it, and report its number and step.

Every rank writes a heartbeat, with its progress, to the rendezvous store once a second. A rank reads those of its
peers only when it waits for them too long, or when its connection to them is lost.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from dist_train.errors import LostPeerError, first_line, say

_BEAT = 1.0  # seconds between two heartbeats
_ANSWER = 5.0  # seconds without an answer after which the store counts as lost
_SILENT = 3  # missing heartbeats in a row after which a rank counts as dead
_STORE_TIMEOUT = timedelta(seconds=10)


class Heartbeat:
    """Writes this rank's heartbeats, and reads those of its peers."""

    def __init__(self, rank: int, world_size: int, timeout: int, start: str) -> None:
        """Start a thread that writes the heartbeats. timeout: seconds to wait for a rank in one exchange; after them
        this thread calls `before_exit` and ends the process. start: the prefix of what this start of the ranks
        stores."""
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.step = 0  # the step that is being computed, counted from 1; 0 before the first
        self.beats = self.exchanges = 0
        self.waiting_since: float | None = None
        self.failure = ""
        self.before_exit: Callable[[], object] = lambda: None
        self.store_lost = False
        self.closed = threading.Event()
        self.lock = threading.Lock()
        # a separate connection to the store: the process group's is blocked during an exchange
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, None, False, _STORE_TIMEOUT, wait_for_workers=False)
        self.store = PrefixStore(f"{start}/heartbeat", store)
        self._beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """A context around every collective operation: the time in it counts as waiting for peers."""
        if self.waiting_since is not None:  # inside another exchange
            yield
            return
        self.exchanges += 1
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None

    def close(self, failure: str = "") -> None:
        """Stop the heartbeats, after a last one that reports the end. failure: why this rank ends early, "" where it
        does not."""
        self.failure = failure
        self.closed.set()
        self._beat()

    def leave(self) -> None:
        """Stop the heartbeats because a peer is lost."""
        self.close()
        if self.rank == 0:
            time.sleep(2 * _BEAT)  # the store may end with this process, while peers still read from it

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
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer either ({first_line(error)})"
            )
        waited = f" ({error})" if isinstance(error, TimeoutError) else ""
        context = f"rank {self.rank} was waiting for it in step {self.step}{waited}"
        ended = {rank: beat for rank, beat in second.items() if beat["ended"]}
        failed = {rank: beat for rank, beat in ended.items() if beat["failure"]}
        silent = {rank: beat for rank, beat in second.items() if beat == first.get(rank) and rank not in ended}
        for rank, beat in {**failed, **silent, **ended}.items():
            state = (
                f"has failed ({beat['failure']})" if beat["failure"] else "has ended" if beat["ended"] else "is gone"
            )
            if rank in silent or beat["failure"] or beat["exchanges"] < self.exchanges:
                return LostPeerError(
                    f"{_describe(rank, beat)} {state}; {context}", self._is_reporter({*failed, *silent})
                )
        behind = {rank: beat for rank, beat in second.items() if beat["exchanges"] < self.exchanges}
        for rank, beat in behind.items():
            hangs = f"{_describe(rank, beat)} hangs, although its process lives; {context}"
            return LostPeerError(hangs, self._is_reporter(set(behind)))
        return None

    def _is_reporter(self, missing: set[int]) -> bool:
        """Whether this rank prints the message: the lowest rank that is not missing."""
        return self.rank == min(set(range(self.world_size)) - missing, default=self.rank)

    def _read(self) -> dict[int, dict[str, Any]] | None:
        """The last heartbeat of each other rank; None where the store does not answer."""
        peers = [rank for rank in range(self.world_size) if rank != self.rank]
        answers: list[dict[int, dict[str, Any]]] = []

        def read() -> None:
            with suppress(RuntimeError), self.lock:
                present = [rank for rank in peers if self.store.check([str(rank)])]
                answers.append({rank: json.loads(self.store.get(str(rank))) for rank in present})

        # In a thread, since the store's own timeout does not help: once its host is off the network, a read never ends.
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(_ANSWER)
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
        if self.store_lost or not self.lock.acquire(timeout=_BEAT):  # the store does not answer
            return
        try:
            self.store.set(str(self.rank), json.dumps(beat))
        except RuntimeError:  # the store's host is gone: the next exchange raises
            self.store_lost = True
        finally:
            self.lock.release()

    def _run(self) -> None:
        while not self.closed.wait(_BEAT):
            self._beat()
            since = self.waiting_since
            if since is None or time.monotonic() - since < self.timeout:
                continue
            # The main thread is blocked in the exchange, so this thread prints the message and ends the process.
            hung = TimeoutError(f"waited {self.timeout} s, train.timeout")
            error = self.lost(hung) or LostPeerError(
                f"the ranks lost contact in step {self.step}: each waits for the others, none is behind ({hung})"
            )
            if self.waiting_since != since:
                continue  # the exchange has ended while the heartbeats were read
            if error.reported_here:
                say(str(error))
            self.leave()
            self.before_exit()
            os._exit(1)


def _describe(rank: int, beat: dict[str, Any]) -> str:
    return f"rank {rank} (process {beat['pid']} on {beat['host']}, last seen in step {beat['step']})"
