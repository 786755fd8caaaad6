"""Names of the files in a run folder, and in a group: the folder above the run folders of one array. Without torch."""

from __future__ import annotations

import re
from pathlib import Path

from dist_train.config.loading import FILE

SETTINGS = FILE  # the configuration as TOML: see is_run
METRICS = "metrics.jsonl"  # the metrics of every step and evaluation: see metrics.py
SUMMARY = "summary.json"  # the results, once the run is done
EVALUATION = "evaluation.json"  # the last evaluation in full
HISTORY = "history.jsonl"  # starts, ends and faults
DIVERGED = "diverged.json"  # the loss or the gradients that were not finite
CHECKPOINTS = "checkpoints"  # the folder of checkpoints
LOSS_PLOT, ACCURACY_PLOT = PLOTS = ("plots/loss.png", "plots/accuracy.png")
SAMPLES = "system/rank-*.jsonl"  # a file for each rank: see system_metrics.py
WANDB = "wandb"  # the folder of W&B's files
EXPORT = "export"  # the folder of exported networks
# the files in it by format, with a configuration and a model card
EXPORTED = {"safetensors": "model.safetensors", "torch": "model.pt2", "onnx": "model.onnx"}
MEETINGS = "meetings"  # a folder with a file for each start of a job, through which its nodes find each other

# what a training writes; one of them is in every folder of a run
RECORD = (METRICS, SUMMARY, EVALUATION, HISTORY, DIVERGED, CHECKPOINTS)

# files of a group

MEMBERS = "members.json"  # {name of the run folder: the trainer's arguments}, as submitted
TABLE = "table.md"
_TABLE_LOCK = ".table.lock"
_LOCK = ".lock"  # its text names the process that trains in the folder
_CHECKPOINT = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})\.pt")  # as `checkpoint_path` makes it
_CHECKSUM, _DAMAGED = ".sha256", ".damaged"


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder: has a configuration, and is not that of an exported network."""
    exported = any((folder / name).exists() for name in EXPORTED.values()) and not (folder / METRICS).exists()
    return (folder / SETTINGS).exists() and not exported


def links(run_dir: Path) -> list[Path]:
    """The symbolic links in a run folder that have a name which a training writes to."""
    folders = (Path(name).parts[0] for name in (*PLOTS, SAMPLES, WANDB))
    names = dict.fromkeys((_LOCK, SETTINGS, *RECORD, *folders))
    return [path for name in names if (path := run_dir / name).is_symlink()]


def lock_path(run_dir: Path) -> Path:
    """The file that is locked while a process trains in the run folder."""
    return run_dir / _LOCK


def table_lock_path(group: Path) -> Path:
    """The file that is locked while a process writes a group's table."""
    return group / _TABLE_LOCK


def samples_path(run_dir: Path, rank: int) -> Path:
    """The file of a rank's system metrics."""
    return run_dir / SAMPLES.replace("*", str(rank))


def checkpoint_folder(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / CHECKPOINTS


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint after `step` finished steps, in a folder of checkpoints."""
    return folder / f"step-{step:08d}.pt"


def step_of(path: Path) -> int:
    """The number of finished steps in a checkpoint's name. Raises ValueError for other names."""
    if (match := _CHECKPOINT.fullmatch(path.name)) is None:
        raise ValueError(f"{path}: not the name of a checkpoint, such as step-00000250.pt")
    return int(match[1])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder of checkpoints, in order of their steps; none where there is no such folder."""
    return sorted((path for path in folder.glob("step-*.pt") if _CHECKPOINT.fullmatch(path.name)), key=step_of)


def checksum_path(checkpoint: Path) -> Path:
    """The file beside a checkpoint with its SHA-256, in the format of `sha256sum --check`."""
    return checkpoint.with_name(checkpoint.name + _CHECKSUM)


def checksums(folder: Path) -> list[Path]:
    """The files with checksums in a folder of checkpoints, those without a checkpoint included."""
    return [path for path in folder.glob(f"step-*.pt{_CHECKSUM}") if _CHECKPOINT.fullmatch(path.stem)]


def damaged_path(checkpoint: Path) -> Path:
    """The path that a damaged checkpoint is renamed to."""
    return checkpoint.with_name(checkpoint.name + _DAMAGED)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, None for one that lies elsewhere."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS and is_run(folder.parent) else None
