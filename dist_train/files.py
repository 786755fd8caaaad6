"""Files that appear whole or not at all, and a lock on a file."""

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
    """Replace the file `path` by `data`, so that even a power cut leaves the old one or the new one whole.

    Raises OSError, and leaves nothing behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def remove_partial(folder: Path) -> None:
    """Remove the files in a folder that `write_atomic` of a killed process began. No other may be writing here."""
    for partial in folder.glob(".*.*"):
        if partial.suffix[1:].isdigit():
            partial.unlink()


@contextmanager
def claimed(path: Path, wait: float) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made if it is missing and then names this process; the kernel releases
    the lock when the process ends, however it ends.

    wait: seconds to wait for another process that holds it. Raises BlockingIOError, whose text names that process, when
    it still does, and OSError where the file system refuses.
    """
    with path.open("a+") as file:
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
