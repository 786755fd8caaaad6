"""Atomic writes of files, and a lock on a file."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.data_prep.files import lock, no_links, sync, temporary


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace the content of `path` by `data` atomically: even a power cut leaves the old file or the new one complete.
    A link is replaced by a file, and its target is left as it is; to a device or a pipe the data are written.

    Raises OSError, which names `path`, and then leaves no partial file."""
    partial = temporary(path, str(os.getpid()))
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        try:
            partial.unlink(missing_ok=True)
            with partial.open("xb") as file:
                file.write(data)
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the partial file's
        raise


def remove_partial(folder: Path) -> None:
    """Remove partial files that `write_atomic` of a killed process left. No other process may be writing in the
    folder."""
    for path in folder.glob(str(temporary(Path("*"), "*"))):
        if re.fullmatch(r".+\.[0-9]+\.[^.]+", path.name) and not path.is_dir():
            path.unlink()


@contextmanager
def claimed(path: Path, wait: float) -> Iterator[None]:
    """A context that holds an exclusive lock on the file `path`, which is created if it is missing and then names this
    process; the kernel releases the lock when the process ends, in any way.

    wait: seconds to wait for another process to release it. Raises BlockingIOError, with that process as its message,
    when it does not, and OSError where the file is a link. On a file system without locks nothing is locked: see
    `data_prep.files.lock`.
    """
    with open(path, "a+", encoding="utf-8", errors="replace", opener=no_links) as file:
        deadline = time.monotonic() + wait
        while True:
            try:
                lock(file.fileno(), path)
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
