"""Each rank's watch over its peers: one that died or hangs is noticed, and named with its step.

Every rank tells the rendezvous store once a second that it lives, and how far it has come. Only a rank whose
peers keep it waiting, or whose connection to them broke, reads what the others told.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from dist_train.errors import LostPeerError

_BEAT = 1.0  # seconds between two signs of life
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
        self.closed = threading.Event()
        self.lock = threading.Lock()
        # a connection of its own: that of the process group is blocked while it waits
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, None, False, _STORE_TIMEOUT, wait_for_workers=False)
        self.store = PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
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

    def lost(self, error: BaseException) -> LostPeerError | None:
        """Who is to blame for an error of a collective operation; None when no peer is. Takes a few seconds."""
        first = self._told()
        for _ in range(_SILENT):  # seconds in which this rank goes on to give its own signs
            time.sleep(_BEAT)
            self._beat()
        second = self._told()
        if second is None or first is None:
            return LostPeerError(
                f"rank {self.rank} on {platform.node()} lost its peers in step {self.step}: the rendezvous store at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer either ({_line(error)})"
            )
        ended = {rank: told for rank, told in second.items() if told["ended"]}
        failed = {rank for rank, told in ended.items() if told["failure"]}  # the others of them have spoken
        silent = {rank: told for rank, told in second.items() if told == first.get(rank) and rank not in ended}
        here = f"rank {self.rank} was waiting for it in step {self.step}"
        for rank, told in {**silent, **ended}.items():
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
        try:
            with self.lock:
                there = [rank for rank in others if self.store.check([str(rank)])]
                return {rank: json.loads(self.store.get(str(rank))) for rank in there}
        except RuntimeError:
            return None

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
        try:
            with self.lock:
                self.store.set(str(self.rank), json.dumps(told))
        except RuntimeError:  # the store went with its host; the exchanges will show it
            pass

    def _run(self) -> None:
        while not self.closed.wait(_BEAT):
            self._beat()
            since = self.waiting_since
            if since is None or time.monotonic() - since < self.timeout:
                continue
            # The main thread is inside the exchange and cannot be reached: the message and the end come from here.
            hung = TimeoutError(f"waited {self.timeout} s, train.timeout")
            found = self.lost(hung) or LostPeerError(
                f"the ranks lost contact in step {self.step}: each waits for the others, none is behind"
            )
            if self.waiting_since != since:
                continue  # it came after all
            if found.speaks:
                print(f"dist_train: {found} ({hung})", file=sys.stderr, flush=True)
            self.close()
            if self.rank == 0:
                time.sleep(2 * _BEAT)  # the store may go with this process, and others are just asking it
            os._exit(1)


def _place(rank: int, told: dict[str, Any]) -> str:
    return f"rank {rank} (process {told['pid']} on {told['host']}, last seen in step {told['step']})"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
