"""Errors of data_prep, and its use of the file system: a lock, checksums, fsync."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.errors import NO_NETWORK, UserError, say


class DataError(UserError):
    """The data set, or a setting for it, is unusable.

    The message is one sentence that names the file or setting, what is wrong with it and the remedy.
    """


class NoNetworkError(DataError):
    """A download was needed and failed. Its exit code is 3."""

    code = NO_NETWORK


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context that holds an exclusive lock on the file `path` (created if missing, never removed), waiting if needed.

    The kernel releases the lock when its holder ends, in any way, so a leftover lock file does no harm. Raises
    OSError if the file cannot be created or its file system has no locks.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for the process that holds {path}", "data_prep")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
