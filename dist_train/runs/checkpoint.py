"""Checkpoints: their contents, and one file for each, written atomically, with its SHA-256 beside it."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from dist_train.config.trees import leaves
from dist_train.data_prep import Manifest
from dist_train.data_prep.files import sha256_of
from dist_train.errors import UserError, first_line, reason, say, unreadable
from dist_train.files import remove_partial, write_atomic
from dist_train.runs import layout
from dist_train.runs.contents import read_checksum
from dist_train.runs.environment import Environment

REMEDY = "name a checkpoint, a run folder or an exported model.safetensors"
_OPTIMIZERS = "optimizers"  # prefix of the names of the optimizers' tensors in `tensor_digests`


class _Described(BaseModel):
    """What `DataDescription.to_dict` gives."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    dataset: str
    classes: list[str] = Field(min_length=1)
    image_shape: list[Annotated[int, Field(ge=1, lt=1 << 16)]] = Field(min_length=3, max_length=3)
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    content_sha256: dict[str, str] = {}
    grey_bits: Annotated[int, Field(ge=1, le=16)] | None = None

    @model_validator(mode="after")
    def _sizes(self) -> _Described:
        if not len(self.mean) == len(self.std) == self.image_shape[2]:
            raise ValueError("mean and std are not of each channel")
        return self


class _Held(BaseModel):
    """The entries of a checkpoint that are checked here; its other users check the rest."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    step: int = Field(ge=0)
    model: dict[str, Tensor]
    scaler: dict[str, Any] = {}
    environments: list[dict[str, str]] = []
    config: str | None = None
    data: _Described | None = None
    losses: Tensor | None = None


@dataclass(frozen=True)
class DataDescription:
    """The data set that a network was trained on: what using the network requires of it.

    classes: their names, in the order of the logits. image_shape: (H, W, C). mean, std: of each channel of the training
    images, whose values go from 0 to 1. content_sha256: of the pixels and labels of each split, by the split's name;
    empty in checkpoints of an earlier version. grey_bits: of the grey values in pictures of 16 bits, as in
    `data_prep.pictures.read_picture`; None where there are none.
    """

    dataset: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content_sha256: dict[str, str]
    grey_bits: int | None = None

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
            grey_bits=manifest.grey_bits,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DataDescription:
        """From `to_dict`. Raises ValueError for anything else."""
        found = _Described.model_validate(data)
        height, width, channels = found.image_shape
        classes, mean, std = tuple(found.classes), tuple(found.mean), tuple(found.std)
        shape = (height, width, channels)
        return cls(found.dataset, classes, shape, mean, std, found.content_sha256, found.grey_bits)

    def to_dict(self) -> dict[str, Any]:
        """The dict in a checkpoint, which is also valid JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint: all that resuming the run requires, and all that using the network requires.

    step: the number of finished steps. model: weights and BatchNorm statistics by name, in the network's order.
    optimizers, scaler: their state, empty where the file has none. environments: those that the run has had, in
    order. config: the configuration as TOML. data: the data set. These three are missing in checkpoints of earlier
    versions. losses: of each training image, where they choose images.
    """

    step: int
    model: dict[str, Tensor]
    optimizers: Any = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    environments: list[Environment] = field(default_factory=list)
    config: str | None = None
    data: DataDescription | None = None
    losses: Tensor | None = None

    @classmethod
    def from_dict(cls, state: Any) -> Checkpoint:
        """From the dict in a file, whose other entries are dropped. Raises ValueError for other contents than ours."""
        try:
            _Held.model_validate(state)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
            raise ValueError(f"it is not a checkpoint of dist_train ({why})") from None
        known = {key: state[key] for key in cls.__dataclass_fields__ if key in state}
        data = DataDescription.from_dict(known["data"]) if known.get("data") else None
        return cls(**{**known, "model": _current(known["model"]), "data": data})

    def to_dict(self) -> dict[str, Any]:
        """The dict that is written to the file."""
        fields = {key: getattr(self, key) for key in self.__dataclass_fields__}
        fields["data"] = self.data.to_dict() if self.data else None
        return {key: value for key, value in fields.items() if value is not None}


def _current(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state with this version's names: earlier ones had a row of statistics for each microbatch."""
    return {
        name.replace(".rows_", "."): tensor.mean(0) if ".rows_" in name else tensor for name, tensor in model.items()
    }


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
        failed: Callable[[int, Exception], None],
    ) -> None:
        """keep: the number of checkpoints to keep. stamp: entries that every checkpoint has besides the state.
        Callbacks, called in the thread: before, ahead of each file; written, with the path of each finished file;
        failed, with the step and the error when a file could not be written, for whatever reason; older checkpoints
        stay."""
        self.folder, self.keep, self.stamp = folder, keep, stamp
        self.before, self.written, self.failed = before, written, failed
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write the state after `step` steps, once the previous checkpoint is written. The tensors of
        `state` may change after the call."""
        self.wait()
        self.error = None
        try:
            copied = {**_copied(state), **self.stamp}
            thread = threading.Thread(target=self._write, args=(step, copied), name="checkpoint")
            thread.start()
        except Exception as error:  # such as too little memory for the copy
            self._fail(step, error)
        else:
            self.thread = thread

    def wait(self) -> Exception | None:
        """Wait, in any thread, until the last checkpoint is written. Returns its error, None when it is on the disk."""
        if self.thread is not None:
            self.thread.join()
        return self.error

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            self.before()
            path = save(self.folder, step, state, self.keep)
        except Exception as error:
            self._fail(step, error)
        else:
            self.written(path)

    def _fail(self, step: int, error: Exception) -> None:
        self.error = error
        self.failed(step, error)


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps and remove all but the newest `keep` checkpoints. Raises OSError."""
    folder.mkdir(exist_ok=True)  # not its parents: a run folder that was moved is not made anew
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
    """The newest checkpoint that is whole, None in a folder without any. Newer ones that are damaged are renamed to
    `*.damaged`, and reported on stderr. Raises UserError, and renames none, where all are damaged."""
    whole, damaged = newest_whole(folder)
    if damaged and whole is None:
        path, why = damaged[0]
        raise UserError(
            f"checkpoint {path} {why}, and there is no other to resume from; restore it from a copy, or remove the "
            f"folder {folder} to start the run over"
        )
    for path, why in damaged:
        say(f"checkpoint {path} {why}; it is set aside and the one before it is used")
        path.replace(layout.damaged_path(path))
        layout.checksum_path(path).unlink(missing_ok=True)
    return whole


def newest_whole(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, None without one; and the newer ones with their faults: see `wrong`."""
    damaged: list[tuple[Path, str]] = []
    for path in reversed(layout.checkpoints(folder)):
        if (why := wrong(path)) is None:
            return path, damaged
        damaged.append((path, why))
    return None, damaged


def steps(folder: Path) -> list[int]:
    """The numbers of finished steps of all checkpoints in a folder, in order."""
    return [layout.step_of(path) for path in layout.checkpoints(folder)]


def load(path: Path) -> dict[str, Any]:
    """The dict in a checkpoint's file, with its tensors on the CPU: see `Checkpoint`. No code in the file is run, and
    no more memory taken than the file has bytes. Raises OSError, ValueError, and the errors of zipfile and torch.load.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as file:  # torch.save stores what it packs, and torch.load would unpack anything
        parts = file.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise ValueError("it is compressed")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # a tensor may stand for more bytes than are stored, by a stride of zero
    if sum(value.nbytes for _, value in leaves(state) if isinstance(value, Tensor)) > size:
        raise ValueError("its tensors are larger than the file")
    return state


def read(path: Path, remedy: str = REMEDY) -> Checkpoint:
    """A checkpoint, with its tensors on the CPU. No code in the file is run. Raises UserError, with the remedy, for a
    file that cannot be read, is damaged or of another kind."""
    try:
        return Checkpoint.from_dict(load(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); {remedy}") from None
    except Exception as error:  # torch raises many types
        why = first_line(error) if isinstance(error, ValueError) else "code in a file is never run"
        raise UserError(f"{path}: is damaged, or not a file of dist_train ({why}); {remedy}") from None


def wrong(path: Path) -> str | None:
    """The fault of a checkpoint by its checksum, such as `has no checksum`; None when it is whole. Raises UserError for
    one that cannot be read."""
    if (expected := read_checksum(path)) is None:
        return "has no checksum"
    try:
        return None if sha256_of(path) == expected else "does not match its checksum"
    except OSError as error:
        raise unreadable(path, error) from None


def tensor_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, by name: first the weights and BatchNorm statistics in the network's order, then
    the optimizers' state, under names that begin with `optimizers.`, and the images' `losses`."""
    named = [*leaves(checkpoint.model), *leaves(checkpoint.optimizers, _OPTIMIZERS), ("losses", checkpoint.losses)]
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
