"""The trainer on a wire that never reports a lost peer: where gloo's wait raises an error, this one continues for ever,
as NCCL's does, and takes no signal."""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn
from unittest.mock import patch

import torch.distributed as dist

from dist_train.main import entry

wait, swap = dist.Work.wait, dist.batch_isend_irecv


def install() -> None:
    """Replace the waits, and the sends to a peer whose connection is closed already, in this process."""
    patch.object(dist.Work, "wait", _wait).start()
    patch.object(dist, "batch_isend_irecv", _swap).start()


def _wait(self: dist.Work, *arguments: Any) -> bool:
    try:
        return wait(self, *arguments)
    except RuntimeError:
        _block()


def _swap(operations: list[dist.P2POp]) -> list[dist.Work]:
    try:
        return swap(operations)
    except RuntimeError:
        _block()


def _block() -> NoReturn:
    """As a call of CUDA on a GPU that waits: without the interpreter's lock, and deaf to signals."""
    mutex = ctypes.create_string_buffer(64)  # zeros are a new one
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


if __name__ == "__main__":
    install()
    entry()
