"""Atomic writes of files, and a lock on a file."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.data_prep.files import sync


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace the content of `path` by `data` atomically: even a power cut leaves the old file or the new one complete.

    Raises OSError, and then leaves no partial file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def remove_partial(folder: Path) -> None:
    """Remove partial files that `write_atomic` of a killed process left. No other process may be writing in the
    folder."""
    for partial in folder.glob(".*.*"):
        if partial.suffix[1:].isdigit():
            partial.unlink()


@contextmanager
def claimed(path: Path, wait: float) -> Iterator[None]:
    """A context that holds an exclusive lock on the file `path`, which is created if it is missing and then names this
    process; the kernel releases the lock when the process ends, in any way.

    wait: seconds to wait for another process to release it. Raises BlockingIOError, with that process as its message,
    when it does not, and OSError where the file system has no locks.
    """
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise BlockingIOError(file.read().strip()) from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
