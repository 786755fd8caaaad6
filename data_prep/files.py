"""Errors of data_prep, and its use of the file system: a lock, checksums, fsync, names of its own."""

import errno
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
    OSError if the file cannot be created or is a link.
    """
    with open(path, "a", encoding="utf-8", opener=no_links) as file:
        try:
            lock(file.fileno(), path)
        except BlockingIOError:
            say(f"waiting for the process that holds {path}", "data_prep")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock(file: int, path: Path) -> None:
    """Lock an open file exclusively. Raises BlockingIOError where another process holds the lock. On a file system
    without locks this is said, and nothing is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        say(
            f"{path} cannot be locked ({error.strerror}): nothing keeps a second process from writing there at the "
            f"same time, so start only one"
        )


def no_links(path: str, flags: int) -> int:
    """An opener for `open` that refuses a symbolic link, whose target is somebody else's file. Raises OSError."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a symbolic link", path) from None


def temporary(path: Path, name: str) -> Path:
    """A path beside `path` for a file or folder that is moved to it once it is complete, and that nobody else gives to
    a file: `.PATH.NAME.dist_train`."""
    return path.with_name(f".{path.name}.{name}.dist_train")


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
