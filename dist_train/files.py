"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.files import sync


def write_atomic(path: Path, data: bytes) -> None:
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
