"""Runs a function on several ranks, each in a process of its own (forked.py)."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import forked


@dataclass
class Answer:
    """The result of one rank: the value that its work returned, or its exception as text, and its exit code, None for a
    rank that had not ended."""

    value: Any = None
    error: str = ""
    code: int | None = None


def run_ranks(
    world_size: int, work: Callable[..., Any], *arguments: Any, answering: int | None = None, timeout: float = 120
) -> list[Answer]:
    """Call `work(*arguments)`, a function of a test module, on every rank, with a launcher's variables, and wait until
    `answering` ranks (all, unless given) have ended, at most `timeout` seconds. Returns the result of each rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    forked.start()
    answers = forked.SERVER.Queue()
    ranks = [
        forked.SERVER.Process(target=_rank, args=(answers, rank, world_size, port, work, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found = [Answer() for _ in ranks]
    deadline = time.monotonic() + timeout
    try:
        while sum(answer.code is not None for answer in found) < (answering or world_size):
            assert time.monotonic() < deadline, f"the ranks have not ended within {timeout} s: {found}"
            with contextlib.suppress(queue.Empty):
                rank, found[rank].value, found[rank].error = answers.get(timeout=0.05)
            for process, answer in zip(ranks, found, strict=True):
                answer.code = process.exitcode
        with contextlib.suppress(queue.Empty):
            while True:
                rank, found[rank].value, found[rank].error = answers.get(timeout=0.2)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return found


def _rank(answers: Any, rank: int, world_size: int, port: int, work: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        answers.put((rank, work(*arguments), ""))
    except BaseException as error:
        answers.put((rank, None, f"{type(error).__name__}: {error}"))
