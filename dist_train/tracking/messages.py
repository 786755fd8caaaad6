"""What rank 0 tells the W&B process of its run: typed messages, each a line of JSON on its standard input."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.config.settings import RecordConfig
from dist_train.runs.layout import METRICS, SAMPLES

INIT_TIMEOUT = 5.0  # seconds for the server to answer before the run goes offline
FINISH_TIMEOUT = 15.0  # seconds for what is still to upload at the end


@dataclass(frozen=True)
class Begin:
    """The first message: which run this is.

    run_dir: the run folder, absolute. mode: of RecordConfig. settings: of wandb.Settings. config: shown with the run.
    branches: for each block the names of its convolutions. matrix_rate: FLOP/s of matrix products on all ranks, NaN
    for no MFU. seen: bytes of each file, by its path in the run folder, that the W&B run has already. samples: whether
    the ranks sample themselves.
    """

    run_dir: str
    mode: str
    settings: dict[str, Any]
    config: dict[str, Any]
    branches: list[list[str]]
    matrix_rate: float
    seen: dict[str, int]
    samples: bool


@dataclass(frozen=True)
class Artifact:
    """A checkpoint that W&B is to keep. path: absolute."""

    path: str


@dataclass(frozen=True)
class Summary:
    """What there is at the end of a run that is done. summary: of summary.json. pictures: absolute paths of the plots.
    evaluation: of evaluation.json, None where it is missing."""

    summary: dict[str, Any]
    pictures: list[str]
    evaluation: str | None


@dataclass(frozen=True)
class End:
    """The last message. exit_code: of rank 0."""

    exit_code: int


Message = Begin | Artifact | Summary | End
_KINDS = {kind.__name__: kind for kind in (Begin, Artifact, Summary, End)}


def encode(message: Message) -> bytes:
    """The message as a line."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return json.dumps({"kind": type(message).__name__, **fields}, default=str).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line that `encode` wrote."""
    fields = json.loads(line)
    message: Message = _KINDS[fields.pop("kind")](**fields)
    return message


def begin(
    run_dir: Path,
    record: RecordConfig,
    *,
    config: dict[str, Any],
    branches: Sequence[Sequence[str]],
    offset: int,
    matrix_rate: float,
) -> Begin:
    """The first message of a run.

    Args:
        run_dir: the run folder, with a `metrics.jsonl`. Files go to its `wandb/`, with the run's id: a restart or a
            move continues the W&B run.
        config: the configuration to show, of values that JSON has.
        branches: for each block the names of its convolutions.
        offset: bytes of `metrics.jsonl` that a run which is resumed has sent; the lines after them are sent as they
            come.
        matrix_rate: floating-point operations a second of matrix products on all ranks; NaN for no MFU.
    """
    run_dir = run_dir.absolute()
    samples = {str(path.relative_to(run_dir)): path.stat().st_size for path in run_dir.glob(SAMPLES)}
    settings = {
        "project": record.project,
        "run_name": record.name or run_dir.resolve().name,
        **({"run_group": record.group} if record.group else {}),  # unset, the environment's count
        **({"run_tags": list(record.tags)} if record.tags else {}),
        "resume": "allow",  # never with step=: W&B drops the rows of a step that is replayed
        "root_dir": str(run_dir),
        "console": "off",
        "silent": True,
        "program": sys.argv[0],
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
        "finish_timeout_raises": True,
        "x_stats_pid": os.getpid(),
        "x_transaction_log_flush_interval": 1.0,  # a killed run loses a second, not fifteen
    }
    return Begin(
        run_dir=str(run_dir),
        mode=record.wandb,
        settings=settings,
        config=config,
        branches=[list(names) for names in branches],
        matrix_rate=matrix_rate,
        seen={METRICS: offset, **samples},
        samples=record.system == "all",
    )


def summary(values: dict[str, Any], pictures: Sequence[Path], evaluation: Path) -> Summary:
    """The message at the end of a run that is done. evaluation: the path of `evaluation.json`, which need not exist."""
    paths = [str(picture.absolute()) for picture in pictures]
    return Summary(values, paths, str(evaluation.absolute()) if evaluation.exists() else None)
