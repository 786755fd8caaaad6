"""Each rank's watch over its peers: one that died or hangs is noticed, and named with its step.

Every rank tells the rendezvous store once a second that it lives, and how far it has come. Only a rank whose
peers keep it waiting, or whose connection to them broke, reads what the others told.
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

_BEAT = 1.0  # seconds between two signs of life
_ANSWER = 5.0  # seconds until the store counts as gone
_SILENT = 3  # of them missing in a row mean that a rank is gone
_STORE_TIMEOUT = timedelta(seconds=10)


class Watch:
    """This rank's signs of life, and its look at those of others."""

    def __init__(self, rank: int, world_size: int, timeout: int) -> None:
        """Begin, in a thread of its own. timeout: seconds that a rank may be waited for in one exchange."""
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
        self.store = PrefixStore(f"watch/{attempt}", store)
        self._beat()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

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
        """End, and tell the others so; failure: why this rank leaves before its time."""
        self.failure = failure
        self.closed.set()
        self._beat()

    def leave(self) -> None:
        """End because a peer is lost."""
        self.close()
        if self.rank == 0:
            time.sleep(2 * _BEAT)  # the store may go with this process, and others are just asking it

    def lost(self, error: BaseException) -> LostPeerError | None:
        """Who is to blame for an error of a collective operation; None when no peer is. Takes a few seconds."""
        first = self._told()
        for _ in range(_SILENT if first is not None else 0):  # in which this rank goes on to give its own signs
            time.sleep(_BEAT)
            self._beat()
        second = self._told() if first is not None else None
        if first is None or second is None:
            return LostPeerError(
                f"rank {self.rank} on {platform.node()} lost its peers in step {self.step}: the rendezvous store at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer either ({_line(error)})"
            )
        waited = f" ({error})" if isinstance(error, TimeoutError) else ""
        here = f"rank {self.rank} was waiting for it in step {self.step}{waited}"
        ended = {rank: told for rank, told in second.items() if told["ended"]}
        failed = {rank: told for rank, told in ended.items() if told["failure"]}  # the others of them have spoken
        silent = {rank: told for rank, told in second.items() if told == first.get(rank) and rank not in ended}
        for rank, told in {**failed, **silent, **ended}.items():
            state = (
                f"has failed ({told['failure']})" if told["failure"] else "has ended" if told["ended"] else "is gone"
            )
            if rank in silent or told["failure"] or told["exchanges"] < self.exchanges:
                return LostPeerError(f"{_place(rank, told)} {state}; {here}", self._speaks({*failed, *silent}))
        behind = {rank: told for rank, told in second.items() if told["exchanges"] < self.exchanges}
        for rank, told in behind.items():
            hangs = f"{_place(rank, told)} hangs, although its process lives; {here}"
            return LostPeerError(hangs, self._speaks(set(behind)))
        return None

    def _speaks(self, missing: set[int]) -> bool:
        """Whether this is the rank that tells the user: the first of those that are left."""
        return self.rank == min(set(range(self.world_size)) - missing, default=self.rank)

    def _told(self) -> dict[int, dict[str, Any]] | None:
        """What each other rank told last; None without an answer of the store."""
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
        told = {
            "beat": self.beats,
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
            self.store.set(str(self.rank), json.dumps(told))
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
            found = self.lost(hung) or LostPeerError(
                f"the ranks lost contact in step {self.step}: each waits for the others, none is behind ({hung})"
            )
            if self.waiting_since != since:
                continue  # it came after all
            if found.speaks:
                say(str(found))
            self.leave()
            os._exit(1)


def _place(rank: int, told: dict[str, Any]) -> str:
    return f"rank {rank} (process {told['pid']} on {told['host']}, last seen in step {told['step']})"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
