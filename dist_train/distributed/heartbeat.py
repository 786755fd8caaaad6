"""Heartbeats: the peers of a rank that died or hangs detect it, and report its number and step.

Every rank writes a heartbeat, with its progress, to the rendezvous store once a second. A rank reads those of its
peers only when it waits for them too long, or when its connection to them is lost. The first is what counts on GPUs,
where a collective operation of NCCL raises nothing: it waits for a peer that is gone as for a slow one.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from dist_train.errors import LostPeerError, cause, say

_BEAT = 1.0  # seconds between two heartbeats
_LONG_WAIT = 2.0  # seconds of waiting after which the peers' heartbeats are read, once a second
_ANSWER = 6.0  # seconds without an answer after which the store counts as lost
_SILENT = 3  # missing heartbeats in a row after which a rank counts as dead, when a connection is lost
_GONE = 5  # the same without such a sign: a process or its machine may stand still for a moment
_WITHOUT_STORE = 30.0  # seconds to wait at most when the store is closed, which hides whether the peers live
_STORE_TIMEOUT = timedelta(seconds=10)

_Beats = dict[int, dict[str, Any]]  # by rank


class Heartbeat:
    """Writes this rank's heartbeats, and reads those of its peers."""

    def __init__(self, rank: int, world_size: int, timeout: int, start: str) -> None:
        """Start a thread that writes the heartbeats. It also ends the process, after a call of `before_exit` with the
        reason, when the main thread waits for a peer that is gone. timeout: seconds to wait for one that lives in one
        exchange. start: the prefix of what this start of the ranks stores."""
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.step = 0  # the step that is being computed, counted from 1; 0 before the first
        self.beats = self.exchanges = 0
        self.waiting_since: float | None = None
        self.failure = ""
        self.before_exit: Callable[[str], object] = lambda why: None
        self.store_lost = False
        self.closed = threading.Event()
        self.lock = threading.Lock()
        self.ending = threading.RLock()  # held by the thread that ends this rank, once it has begun to; never released
        # a separate connection to the store: the process group's is blocked during an exchange
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, None, False, _STORE_TIMEOUT, wait_for_workers=False)
        self.store = PrefixStore(f"{start}/heartbeat", store)
        self._beat()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    @contextmanager
    def exchange(self, queued: bool = False) -> Iterator[None]:
        """A context around every collective operation: the time in it counts as waiting for peers. With `queued`, so
        does the time after it, until the next exchange."""
        self.exchanges += 1
        self.waiting_since = time.monotonic()
        try:
            yield
        except BaseException:
            queued = False
            raise
        finally:
            if not queued:
                self.waiting_since = None

    def close(self, failure: str = "") -> None:
        """Stop the heartbeats, after a last one that reports the end. failure: why this rank ends early, "" where it
        does not. Does not return where the heartbeats' thread is ending the process."""
        self.ending.acquire()
        self.failure = failure
        self.closed.set()
        self._beat()

    def leave(self) -> None:
        """Stop the heartbeats because a peer is lost."""
        self.close()
        if self.rank == 0:
            time.sleep(2 * _BEAT)  # the store may end with this process, while peers still read from it

    def lost(self, error: BaseException) -> LostPeerError | None:
        """The peer that caused an error of a collective operation; None where none did. Takes a few seconds. Does not
        return where the heartbeats' thread is ending the process."""
        self.ending.acquire()
        return self._lost(error)

    def _lost(self, error: BaseException) -> LostPeerError | None:
        first = self._read()
        for _ in range(_SILENT if first is not None else 0):  # this rank's own heartbeat must not stop
            time.sleep(_BEAT)
            self._beat()
        second = self._read() if first is not None else None
        if first is None or second is None:
            return self._without_store(cause(error))
        silent = {rank for rank, beat in second.items() if beat["ended"] or beat == first.get(rank)}
        missing = self._missing(second, silent, cause(error))
        if missing or not isinstance(error, TimeoutError):
            return missing
        fewest = min((beat["exchanges"] for beat in second.values()), default=self.exchanges)
        behind = {rank for rank, beat in second.items() if beat["exchanges"] == fewest < self.exchanges}
        for rank in sorted(behind):  # the others wait for it, too, where they are not as far as this rank
            hangs = f"{_describe(rank, second[rank])} hangs, although its process lives"
            return LostPeerError(f"{hangs}; {self._waited(cause(error))}", self._is_reporter(behind))
        return None

    def _missing(self, beats: _Beats, silent: set[int], why: str = "") -> LostPeerError | None:
        """The error for the first of the peers that failed, are silent, or ended before this exchange, in this order;
        None where there is none. silent: the ranks without a new heartbeat."""
        ended = {rank for rank, beat in beats.items() if beat["ended"]}
        failed = {rank for rank in ended if beats[rank]["failure"]}
        gone = silent - ended
        early = {rank for rank in silent & ended if beats[rank]["exchanges"] < self.exchanges}
        for rank in (*sorted(failed), *sorted(gone), *sorted(early)):
            beat = beats[rank]
            state = f"has failed ({beat['failure']})" if rank in failed else "is gone" if rank in gone else "has ended"
            return LostPeerError(
                f"{_describe(rank, beat)} {state}; {self._waited(why)}", self._is_reporter(failed | gone)
            )
        return None

    def _without_store(self, why: str) -> LostPeerError:
        return LostPeerError(
            f"rank {self.rank} on {platform.node()} lost its peers in step {self.step}: the rendezvous store at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer either ({why})"
        )

    def _waited(self, why: str) -> str:
        return f"rank {self.rank} was waiting for it in step {self.step}{f' ({why})' if why else ''}"

    def _is_reporter(self, missing: set[int]) -> bool:
        """Whether this rank prints the message: the lowest rank that is not missing."""
        return self.rank == min(set(range(self.world_size)) - missing, default=self.rank)

    def _read(self) -> _Beats | None:
        """The last heartbeat of each other rank; None where the store does not answer."""
        peers = [rank for rank in range(self.world_size) if rank != self.rank]
        answers: list[_Beats] = []

        def read() -> None:
            with self.lock:
                try:
                    present = [rank for rank in peers if self.store.check([str(rank)])]
                    answers.append({rank: json.loads(self.store.get(str(rank))) for rank in present})
                except RuntimeError:
                    self.store_lost = True

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
        watched: float | None = None  # the wait in which the heartbeats below were read
        beats: _Beats = {}
        unchanged: Counter[int] = Counter()  # by rank: how often in a row it was the same
        while not self.closed.wait(_BEAT):
            self._beat()
            since = self.waiting_since
            waited = time.monotonic() - since if since is not None else 0.0
            if waited < _LONG_WAIT:
                continue
            error: LostPeerError | None = None
            limit = min(self.timeout, _WITHOUT_STORE) if self.store_lost else self.timeout
            if waited >= limit:
                hung = TimeoutError(f"waited {limit:g} s{', train.timeout' * (limit == self.timeout)}")
                error = self._lost(hung) or LostPeerError(
                    f"the ranks lost contact in step {self.step}: each waits for the others, none is behind ({hung})"
                )
            elif not self.store_lost:
                now = self._read()
                if now is not None:
                    before = beats if since == watched else {}
                    unchanged = Counter({r: unchanged[r] + 1 for r, beat in now.items() if beat == before.get(r)})
                    beats, watched = now, since
                    error = self._missing(beats, {rank for rank, count in unchanged.items() if count >= _GONE})
                elif not self.store_lost:
                    error = self._without_store(f"waited {waited + _ANSWER:.0f} s")
            if error is None or self.waiting_since != since or not self.ending.acquire(blocking=False):
                continue  # nobody is lost, the exchange has ended meanwhile, or its error has reached the main thread
            # The main thread is blocked in the exchange, so this thread prints the message and ends the process.
            if error.reported_here:
                say(str(error))
            self.leave()
            self.before_exit(str(error))
            os._exit(1)


def _describe(rank: int, beat: dict[str, Any]) -> str:
    return f"rank {rank} (process {beat['pid']} on {beat['host']}, last seen in step {beat['step']})"
