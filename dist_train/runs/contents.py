"""Reads and checks the JSON files of a run folder and of a group, and the lines of its metrics and history.

Only the keys that some reader needs are checked. A file may have more, and those that earlier versions did not write
are optional.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError, model_validator

from dist_train.errors import damaged, unreadable
from dist_train.runs.layout import EVALUATION, MEMBERS, SUMMARY, checksum_path

_Share = Annotated[float, Field(ge=0, le=1)]
_Amount = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=0, le=2**63)]  # the largest number of the arrays that counts are put into
_Steps = Annotated[int, Field(ge=1, le=2**63)]
_Pair = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Summary(_Checked):
    test_accuracy: _Share
    train_seconds: _Amount
    images_per_second: _Amount
    weights_sha256: str
    world_size: _Steps
    device: str
    git_commit: str | None
    dataset: str = ""
    seconds: _Amount = 0.0
    warm_up_seconds: _Amount = 0.0
    test_accuracy_tta: _Share | None = None
    train_accuracy: _Share | None = None
    val_accuracy: _Share = 0.0
    val_accuracy_tta: _Share | None = None
    val_loss: float = 0.0
    mfu: _Amount | None = None
    equal_images: _Count | None = None
    parameters: _Amount | None = None
    flops_per_image: _Amount | None = None
    train_flops: _Amount | None = None
    matrix_flops_per_second: _Amount = 0.0
    versions: dict[str, str | None] = {}
    environments: list[dict[str, str | int]] = []

    @model_validator(mode="after")
    def _pairs(self) -> _Summary:
        if len({"val_accuracy", "val_loss"} & self.model_fields_set) == 1:
            raise ValueError("val_accuracy or val_loss is missing")
        return self


class _Bin(_Checked):
    begin: _Share = Field(alias="from")
    count: _Count
    confidence: _Share | None
    accuracy: _Share | None

    @model_validator(mode="after")
    def _means(self) -> _Bin:
        if self.count and None in (self.confidence, self.accuracy):
            raise ValueError("confidence or accuracy is missing")
        return self


class _Calibration(_Checked):
    ece: _Share
    bins: list[_Bin]


class _Coefficients(_Checked):
    branches: list[str]
    mean: list[float]
    std: list[float]
    by_class: list[list[float]]


class _WrongAnswer(_Checked):
    index: _Count
    label: int
    predicted: int
    confidence: _Share
    png: str = Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")


class _Evaluation(_Checked):
    split: str
    step: _Count
    images: _Steps
    loss: float
    accuracy: _Share
    loss_tta: float = 0.0
    accuracy_tta: _Share = 0.0
    classes: list[str] = Field(min_length=1)
    confusion: list[list[_Count]]
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
        if len({"loss_tta", "accuracy_tta"} & self.model_fields_set) == 1:
            raise ValueError("loss_tta or accuracy_tta is missing")
        return self


class _Members(RootModel[dict[Annotated[str, Field(pattern=r"^[^/\x00]+$")], list[str]]]):
    model_config = ConfigDict(strict=True)


class _StepLine(_Checked):
    kind: Literal["step"]
    step: _Steps
    epoch: float = Field(gt=0)
    loss: float | None
    lr: float | None = None
    grad_norm: float | None = None
    images_per_second: _Amount | None = None
    correct: _Count = 0
    images: _Steps = 1
    flops: _Count = 0


class _EvalLine(_Checked):
    kind: Literal["eval"]
    step: _Steps
    epoch: float = Field(gt=0)
    test_loss: float | None = None
    test_accuracy: _Share | None
    train_loss: float | None = None
    train_accuracy: _Share | None = None
    val_loss: float | None = None
    val_accuracy: _Share | None = None
    test_loss_tta: float | None = None
    test_accuracy_tta: _Share | None = None
    coefficients: list[list[_Pair]] = []


class _WeightsLine(_Checked):
    kind: Literal["weights"]
    step: _Steps
    digests: dict[str, str]


class _Event(_Checked):
    event: str
    time: str = ""
    step: _Count = 0
    outcome: str = ""
    reason: str | None = None
    world_size: _Steps | None = None
    host: str | None = None
    environment: dict[str, str | int] | None = None
    ranks: list[dict[str, str | int]] = []
    changed: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]] = {}


_LINES: TypeAdapter[Any] = TypeAdapter(Annotated[_StepLine | _EvalLine | _WeightsLine, Field(discriminator="kind")])
_EVENTS: TypeAdapter[Any] = TypeAdapter(_Event)


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
    """The SHA-256 in the checksum file beside a checkpoint; None where that is missing or empty. Raises UserError where
    it cannot be read."""
    path = checksum_path(checkpoint)
    try:
        return path.read_text(encoding="utf-8").split()[0]
    except (FileNotFoundError, ValueError, IndexError):
        return None
    except OSError as error:
        raise unreadable(path, error) from None


def metrics_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line of `metrics.jsonl`; None for a line that is torn or not valid."""
    return _parsed(line, _LINES)


def history_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line of `history.jsonl`; None for a line that is torn or not valid."""
    return _parsed(line, _EVENTS)


def _parsed(line: bytes, kind: TypeAdapter[Any]) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
        kind.validate_python(row)
    except (ValueError, RecursionError):  # pydantic's is a ValueError, too
        return None
    return row


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
