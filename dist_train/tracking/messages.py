"""The messages from rank 0 to the W&B process of its run, each a line of JSON on that process's standard input."""

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
from dist_train.tracking.variables import resolved

INIT_TIMEOUT = 5.0  # seconds to wait for the server before the run continues offline
FINISH_TIMEOUT = 15.0  # seconds for uploads at the end of the run
# settings of wandb that keep the machine out of a run: host, user, command line, folders, git, packages, code
_NO_MACHINE = {
    "host": "",
    "program": "dist_train",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
}
_OF_MACHINE = ("versions", "git_commit", "environments")  # in summary.json


@dataclass(frozen=True)
class Begin:
    """The first message, which describes the run.

    run_dir: the run folder, absolute. mode: `record.wandb`, or that of WANDB_MODE. settings: of wandb.Settings. config:
    shown with the run. branches: for each block the names of its convolutions. matrix_rate: FLOP/s of matrix products
    on all ranks, NaN for no MFU. sent: bytes of each file, by its path in the run folder, that the W&B run has already.
    samples: whether each rank samples its system metrics. share: `record.share`. table: whether the terminal shows a
    row for each evaluation.
    """

    run_dir: str
    mode: str
    settings: dict[str, Any]
    config: dict[str, Any]
    branches: list[list[str]]
    matrix_rate: float
    sent: dict[str, int]
    samples: bool
    share: str
    table: bool


@dataclass(frozen=True)
class Artifact:
    """A checkpoint to keep as an artifact. path: absolute."""

    path: str


@dataclass(frozen=True)
class Summary:
    """The results of a run that is done. summary: content of summary.json. plots: absolute paths. evaluation: absolute
    path of evaluation.json, None where it is missing."""

    summary: dict[str, Any]
    plots: list[str]
    evaluation: str | None


@dataclass(frozen=True)
class End:
    """The last message, with the exit code of rank 0."""

    exit_code: int


Message = Begin | Artifact | Summary | End
_KINDS = {kind.__name__: kind for kind in (Begin, Artifact, Summary, End)}


def encode(message: Message) -> bytes:
    """The message as a line of JSON."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return json.dumps({"kind": type(message).__name__, **fields}, default=str).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line that `encode` returned."""
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
        run_dir: the run folder, with a `metrics.jsonl`. Its `wandb/` holds W&B's files and the run's id, so that a
            restart, also of a moved folder, resumes the W&B run.
        record: the settings of W&B.
        config: shown with the run; JSON values.
        branches: for each block the names of its convolutions.
        offset: bytes of `metrics.jsonl` that a resumed run has logged already; only the lines after them are logged.
        matrix_rate: FLOP/s of matrix products on all ranks together; NaN for no MFU.

    Raises UserError for settings or environment variables that W&B does not accept.
    """
    record = resolved(record)
    run_dir = run_dir.absolute()
    samples = {str(path.relative_to(run_dir)): path.stat().st_size for path in run_dir.glob(SAMPLES)}
    settings = {
        "project": record.project,
        "run_name": record.name or run_dir.resolve().name,
        **({"run_group": record.group} if record.group else {}),  # without it, wandb takes WANDB_RUN_GROUP
        **({"run_tags": list(record.tags)} if record.tags else {}),
        "resume": "allow",  # rows are logged without step=, since W&B would drop those of a replayed step
        "root_dir": str(run_dir),
        "console": "off",
        "silent": True,
        "program": sys.argv[0],
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
        "finish_timeout_raises": True,
        "x_stats_pid": os.getpid(),
        "x_transaction_log_flush_interval": 1.0,  # a killed run loses the rows of 1 s instead of 15 s
        **(_NO_MACHINE if record.share == "metrics" else {}),
    }
    return Begin(
        run_dir=str(run_dir),
        mode=record.wandb,
        settings=settings,
        config=config if record.share == "all" else _without_machine(config),
        branches=[list(names) for names in branches],
        matrix_rate=matrix_rate,
        sent={METRICS: offset, **samples},
        samples=record.system == "all",
        share=record.share,
        table=not record.quiet,
    )


def _without_machine(config: dict[str, Any]) -> dict[str, Any]:
    """What is shown with a run, without folders, commit and versions."""
    folders = {"data": ("dir", "source"), "manifest": ("source", "ffcv_version")}
    kept = {key: value for key, value in config.items() if key != "code"}
    for section, names in folders.items():
        if section in kept:
            kept[section] = {key: value for key, value in kept[section].items() if key not in names}
    return kept


def shared(values: dict[str, Any], share: str) -> dict[str, Any]:
    """The contents of a summary.json that W&B gets. share: `record.share`."""
    return {key: value for key, value in values.items() if share == "all" or key not in _OF_MACHINE}


def summary(values: dict[str, Any], plots: Sequence[Path], evaluation: Path) -> Summary:
    """The message with the results of a finished run. evaluation: path of an `evaluation.json`, if there is one."""
    paths = [str(plot.absolute()) for plot in plots]
    return Summary(values, paths, str(evaluation.absolute()) if evaluation.exists() else None)
