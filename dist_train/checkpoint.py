"""Checkpoints: each one file that appears whole or not at all, with its SHA-256 beside it."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_prep.files import sha256_of
from dist_train.files import write_atomic

Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class CheckpointConfig:
    """A checkpoint is written every `every_epochs` epochs, every `every_steps` steps when that is not 0, and at the
    end; the newest `keep` stay."""

    every_epochs: Positive = 1
    every_steps: Annotated[int, Field(ge=0)] = 0
    keep: Positive = 2

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether one is due after `step` steps."""
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        return by_steps or step % (self.every_epochs * steps_per_epoch) == 0


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps and remove all but the newest `keep` checkpoints. The checksum is
    written last: without it the file does not count. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:08d}.pt"
    write_atomic(path, content)
    write_atomic(_checksum(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode())
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        _checksum(old).unlink(missing_ok=True)
        old.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. One that is torn or altered is set aside as `*.damaged`, and named
    on stderr."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        if (wrong := _wrong(path)) is None:
            return path
        print(f"checkpoint {path} {wrong}; it is set aside and the one before it is used", file=sys.stderr)
        path.replace(path.with_name(path.name + ".damaged"))
        _checksum(path).unlink(missing_ok=True)
    return None


def step_of(path: Path) -> int:
    """The number of finished steps that a checkpoint's name says."""
    return int(path.stem.removeprefix("step-"))


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. No code in the file is run."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _wrong(path: Path) -> str | None:
    try:
        expected = _checksum(path).read_text().split()[0]
    except (OSError, IndexError):
        return "has no checksum (its writing was interrupted)"
    return None if sha256_of(path) == expected else "does not match its checksum"
