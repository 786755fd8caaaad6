"""Checkpoints: their contents, and one file for each, written atomically, with its SHA-256 beside it."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config.trees import leaves
from dist_train.data_prep import Manifest
from dist_train.data_prep.files import sha256_of
from dist_train.errors import say
from dist_train.files import remove_partial, write_atomic
from dist_train.runs import layout
from dist_train.runs.contents import read_checksum
from dist_train.runs.environment import Environment

_OPTIMIZERS = "optimizers"  # prefix of the names of the optimizers' tensors in `tensor_digests`


@dataclass(frozen=True)
class DataDescription:
    """The data set that a network was trained on: what using the network requires of it.

    classes: their names, in the order of the logits. image_shape: (H, W, C). mean, std: of each channel of the training
    images, whose values go from 0 to 1. content_sha256: of the pixels and labels of each split, by the split's name;
    empty in checkpoints of an earlier version.
    """

    dataset: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content_sha256: dict[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> DataDescription:
        """The description of a data set from the manifest of its betons."""
        digests = {name: split.content_sha256 for name, split in manifest.splits.items()}
        return cls(
            manifest.dataset,
            manifest.classes,
            manifest.image_shape,
            manifest.mean,
            manifest.std,
            content_sha256=digests,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DataDescription:
        """From `to_dict`. Raises AttributeError, LookupError, TypeError and ValueError for anything else."""
        height, width, channels = data["image_shape"]
        classes, mean, std = (tuple(data[key]) for key in ("classes", "mean", "std"))
        return cls(data["dataset"], classes, (height, width, channels), mean, std, dict(data.get("content_sha256", {})))

    def to_dict(self) -> dict[str, Any]:
        """The dict in a checkpoint, which is also valid JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint: all that resuming the run requires, and all that using the network requires.

    step: the number of finished steps. model: weights and BatchNorm statistics by name, in the network's order.
    optimizers, scaler: their state, empty where the file has none. environments: those that the run has had, in
    order. config: the configuration as TOML. data: the data set. The last three are missing in checkpoints of earlier
    versions.
    """

    step: int
    model: dict[str, Tensor]
    optimizers: Any = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    environments: list[Environment] = field(default_factory=list)
    config: str | None = None
    data: DataDescription | None = None

    @classmethod
    def from_dict(cls, state: Any) -> Checkpoint:
        """From the dict in a file, whose other entries are dropped. Raises ValueError for other contents than ours."""
        if not isinstance(state, dict) or not state.keys() >= {"step", "model"}:
            raise ValueError("it is not a checkpoint of dist_train")
        known = {key: state[key] for key in cls.__dataclass_fields__ if key in state}
        try:
            data = DataDescription.from_dict(known["data"]) if known.get("data") else None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"its description of the data set has another format ({error!r})") from None
        return cls(**{**known, "data": data})

    def to_dict(self) -> dict[str, Any]:
        """The dict that is written to the file."""
        fields = {key: getattr(self, key) for key in self.__dataclass_fields__}
        fields["data"] = self.data.to_dict() if self.data else None
        return {key: value for key, value in fields.items() if value is not None}


class Writer:
    """Writes checkpoints in a thread, so that `write` takes only the time of copying the state."""

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
        """keep: the number of checkpoints to keep. stamp: entries that every checkpoint has besides the state.
        Callbacks, called in the thread: before, ahead of each file; written, with the path of each finished file;
        failed, with the step and the error when a file could not be written; older checkpoints stay."""
        self.folder, self.keep, self.stamp = folder, keep, stamp
        self.before, self.written, self.failed = before, written, failed
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the state after `step` steps, once the previous checkpoint is written. The tensors of
        `state` may change after the call."""
        self.wait()
        copied = {**_copied(state), **self.stamp}
        self.thread = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
        self.thread.start()

    def wait(self) -> OSError | None:
        """Wait until the last checkpoint is written. Returns its error, None when it is on the disk."""
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
    path = layout.checkpoint_path(folder, step)
    # The checksum comes first: whenever the process dies, a checkpoint that exists has one.
    write_atomic(layout.checksum_path(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode())
    write_atomic(path, content)
    for old in layout.checkpoints(folder)[:-keep]:
        old.unlink()
        layout.checksum_path(old).unlink(missing_ok=True)
    return path


def clean(folder: Path) -> None:
    """Remove partial files, and checksums without a checkpoint, which a killed process leaves. No other process may be
    writing to the folder."""
    remove_partial(folder)
    checksums = {layout.checksum_path(path) for path in layout.checkpoints(folder)}
    for checksum in layout.checksums(folder):
        if checksum not in checksums:
            checksum.unlink()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. A damaged one is renamed to `*.damaged`, and reported on stderr."""
    for path in reversed(layout.checkpoints(folder)):
        if (why := wrong(path)) is None:
            return path
        say(f"checkpoint {path} {why}; it is set aside and the one before it is used")
        path.replace(layout.damaged_path(path))
        layout.checksum_path(path).unlink(missing_ok=True)
    return None


def steps(folder: Path) -> list[int]:
    """The numbers of finished steps of all checkpoints in a folder, in order."""
    return [layout.step_of(path) for path in layout.checkpoints(folder)]


def load(path: Path) -> dict[str, Any]:
    """The dict in a checkpoint's file, with its tensors on the CPU: see `Checkpoint`. No code in the file is run."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def read(path: Path) -> Checkpoint:
    """A checkpoint, with its tensors on the CPU. No code in the file is run. Raises OSError for a file that cannot be
    read, ValueError for another kind of file, and the errors of torch.load for a damaged one."""
    return Checkpoint.from_dict(load(path))


def wrong(path: Path) -> str | None:
    """The fault of a checkpoint by its checksum, such as `has no checksum`; None when it is whole."""
    if (expected := read_checksum(path)) is None:
        return "has no checksum"
    return None if sha256_of(path) == expected else "does not match its checksum"


def tensor_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by name: first the weights and BatchNorm statistics in the network's order, then
    the optimizers' state, under names that begin with `optimizers.`."""
    named = [*leaves(checkpoint.model), *leaves(checkpoint.optimizers, _OPTIMIZERS)]
    return {
        name: hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in named
        if isinstance(tensor, Tensor)
    }


def _copied(state: Any) -> Any:
    """A state dict with copies of its tensors, on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state
