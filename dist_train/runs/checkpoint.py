"""Checkpoints: each one file that appears whole or not at all, with its SHA-256 beside it, written in a thread."""

from __future__ import annotations

import hashlib
import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_train.data_prep.files import sha256_of
from dist_train.files import remove_partial, write_atomic


class Writer:
    """Writes checkpoints beside the training: a call of `write` takes the time of copying the state."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        stamp: dict[str, Any],
        *,
        before: Callable[[], None],
        written: Callable[[Path], None],
        failed: Callable[[int, OSError], None],
    ) -> None:
        """stamp: what every checkpoint carries besides the state. In the thread are called: before, ahead of each
        file; written, with each file that is whole; failed, with the step and the reason when one could not be
        written, while the ones before it stay."""
        self.folder, self.keep, self.stamp = folder, keep, stamp
        self.before, self.written, self.failed = before, written, failed
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the state after `step` steps; its tensors may change from now on. Waits for the
        checkpoint before this one."""
        self.wait()
        copied = {**_copied(state), **self.stamp}
        self.thread = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
        self.thread.start()

    def wait(self) -> OSError | None:
        """Wait until the last one is written. Returns why it could not be, None when it is on the disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        return self.error

    def _write(self, step: int, state: dict[str, Any]) -> None:
        self.error = None
        try:
            self.before()
            path = save(self.folder, step, state, self.keep)
        except OSError as error:
            self.error = error
            self.failed(step, error)
        else:
            self.written(path)


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps and remove all but the newest `keep` checkpoints. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"step-{step:08d}.pt"
    # the checksum comes first, so that a checkpoint which is there has one, whenever the process dies
    write_atomic(_checksum(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode())
    write_atomic(path, content)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
        _checksum(old).unlink(missing_ok=True)
    return path


def clean(folder: Path) -> None:
    """Remove what a killed process left of files that never became whole. No other may be writing here."""
    remove_partial(folder)
    for checksum in folder.glob("step-*.pt.sha256"):
        if not checksum.with_suffix("").exists():
            checksum.unlink()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. One that is torn or altered is set aside as `*.damaged`, and named
    on stderr."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        if (why := wrong(path)) is None:
            return path
        print(f"checkpoint {path} {why}; it is set aside and the one before it is used", file=sys.stderr)
        path.replace(path.with_name(path.name + ".damaged"))
        _checksum(path).unlink(missing_ok=True)
    return None


def steps(folder: Path) -> list[int]:
    """The numbers of finished steps that there are checkpoints of, in order."""
    return sorted(step_of(path) for path in folder.glob("step-*.pt"))


def step_of(path: Path) -> int:
    """The number of finished steps that a checkpoint's name says."""
    return int(path.stem.removeprefix("step-"))


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. No code in the file is run."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def wrong(path: Path) -> str | None:
    """What is wrong with a checkpoint by its checksum, None when it is whole."""
    try:
        expected = _checksum(path).read_text().split()[0]
    except (OSError, IndexError):
        return "has no checksum"
    return None if sha256_of(path) == expected else "does not match its checksum"


def _copied(state: Any) -> Any:
    """A state dict with copies of its tensors, on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state
