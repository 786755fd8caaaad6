"""Reads and checks the small files of a run folder and of a group.

Only the keys that some reader needs are checked. A file may have more, and those that earlier versions did not write
are optional.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from dist_train.errors import UserError
from dist_train.runs.layout import EVALUATION, MEMBERS, SUMMARY, checksum_path

_REMEDY = "restore the original file, or omit this run"


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True)


class _Summary(_Checked):
    test_accuracy: float
    train_seconds: float
    images_per_second: float
    weights_sha256: str
    world_size: int
    device: str
    git_commit: str | None
    test_accuracy_tta: float | None = None
    train_accuracy: float | None = None
    val_accuracy: float = 0.0
    val_loss: float = 0.0
    mfu: float | None = None
    equal_images: int | None = None
    parameters: float | None = None
    flops_per_image: float | None = None
    matrix_flops_per_second: float = 0.0
    versions: dict[str, str | None] = {}
    environments: list[dict[str, Any]] = []


class _Bin(_Checked):
    begin: float = Field(alias="from")
    count: int
    confidence: float | None
    accuracy: float | None


class _Calibration(_Checked):
    ece: float
    bins: list[_Bin]


class _Coefficients(_Checked):
    branches: list[str]
    mean: list[float]
    std: list[float]
    by_class: list[list[float]]


class _WrongAnswer(_Checked):
    index: int
    label: int
    predicted: int
    confidence: float
    png: str


class _Evaluation(_Checked):
    split: str
    step: int
    images: int = Field(ge=1)
    loss: float
    accuracy: float
    loss_tta: float = 0.0
    accuracy_tta: float = 0.0
    classes: list[str] = Field(min_length=1)
    confusion: list[list[int]]
    calibration: _Calibration
    coefficients: list[_Coefficients] = Field(min_length=1)
    wrong: list[_WrongAnswer]

    @model_validator(mode="after")
    def _sizes(self) -> _Evaluation:
        classes = len(self.classes)
        if [len(row) for row in self.confusion] != [classes] * classes:
            raise ValueError(f"confusion is not {classes}x{classes}")
        for block in self.coefficients:
            sizes = [len(block.mean), len(block.std), *map(len, block.by_class)]
            if sizes != [len(block.branches)] * (2 + classes):
                raise ValueError("coefficients are not of all branches and classes")
        if any(not 0 <= number < classes for answer in self.wrong for number in (answer.label, answer.predicted)):
            raise ValueError("wrong has an unknown class number")
        return self


class _Members(RootModel[dict[str, list[str]]]):
    model_config = ConfigDict(strict=True)


def damaged(path: Path, why: str) -> UserError:
    """The error for a file of a run whose contents are not valid. why: the reason, in words."""
    return UserError(f"{path} is damaged, or of another version ({why}); {_REMEDY}")


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file of a run that cannot be read."""
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable, or omit this run")


def exists(path: Path) -> bool:
    """Whether the file exists. Raises UserError where its folder cannot be read."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    return True


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The contents of `summary.json`, None before the run's end. Raises UserError for a damaged file."""
    return _read(run_dir / SUMMARY, _Summary)


def read_evaluation(run_dir: Path) -> dict[str, Any] | None:
    """The contents of `evaluation.json`, None where there is no such file. Raises UserError for a damaged file."""
    return _read(run_dir / EVALUATION, _Evaluation)


def read_members(group: Path) -> dict[str, list[str]] | None:
    """The contents of `members.json`, the trainer's arguments by the name of the run folder; None in a folder that was
    not made by submitting an array. Raises UserError for a damaged file."""
    return _read(group / MEMBERS, _Members)


def read_checksum(checkpoint: Path) -> str | None:
    """The SHA-256 in the checksum file beside a checkpoint; None where that is missing or empty."""
    try:
        return checksum_path(checkpoint).read_text().split()[0]
    except (OSError, ValueError, IndexError):
        return None


def _read(path: Path, kind: type[BaseModel]) -> dict[str, Any] | None:
    if not exists(path):
        return None
    try:
        content = path.read_bytes()
        kind.model_validate_json(content)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{key}: {first['msg']}" if key else first["msg"]) from None
    parsed: dict[str, Any] = json.loads(content)
    return parsed
