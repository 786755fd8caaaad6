"""A run, as read from the files of its folder, and the runs of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_train import config
from dist_train.config.settings import Config
from dist_train.config.trees import leaves
from dist_train.errors import UserError, damaged, unreadable
from dist_train.runs import layout
from dist_train.runs.contents import exists, read_evaluation, read_members, read_summary
from dist_train.runs.history import read_history
from dist_train.runs.metrics import Row, read_digests, read_metrics


class Run:
    """A run folder, whose files are read once, on first use. The run need not be done, nor have begun.

    Every attribute that reads a file raises UserError where it is damaged or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def need(self, *names: str) -> None:
        """Raises UserError where one of these files of the folder is missing."""
        for name in names:
            if not exists(self.folder / name):
                raise UserError(f"{self.folder}: there is no {name} in it; name the folder of a run")

    def check(self) -> None:
        """Read all files. Raises UserError where one is damaged or cannot be read, or they are of several runs."""
        self.check_results()
        _ = self.evaluation, self.steps, self.digests
        if not self.begun:
            return
        branches = [len(block.convolutions) for block in self.settings.model.blocks]
        for row in self.evals:
            if row.get("coefficients") and [len(block) for block in row["coefficients"]] != branches:
                why = f"the coefficients of step {row['step']} are not those of the blocks in {layout.SETTINGS}"
                raise damaged(self.folder / layout.METRICS, why)

    def check_results(self) -> None:
        """Read the files that tell the configuration, the results and the state. Raises UserError as `check` does."""
        _ = self.begun and self.settings, self.summary, self.history

    @cached_property
    def begun(self) -> bool:
        return exists(self.folder / layout.SETTINGS)

    @property
    def done(self) -> bool:
        return bool(self.summary)

    @cached_property
    def settings(self) -> Config:
        """The configuration. The run must have begun."""
        return config.read_run(self.folder / layout.SETTINGS, "omit this run")

    @property
    def name(self) -> str:
        """The run's name in its configuration (record.name), else that of its folder."""
        return (self.settings.record.name if self.begun else "") or self.folder.resolve().name

    @cached_property
    def summary(self) -> Row:
        """The contents of `summary.json`; empty before the run's end."""
        return read_summary(self.folder) or {}

    @cached_property
    def evaluation(self) -> Row | None:
        """The contents of `evaluation.json`; None where there is no such file."""
        return read_evaluation(self.folder)

    @property
    def steps(self) -> list[Row]:
        """The step lines of `metrics.jsonl`, in order."""
        return self._metrics[0]

    @property
    def evals(self) -> list[Row]:
        """The eval lines of `metrics.jsonl`, in order."""
        return self._metrics[1]

    @cached_property
    def digests(self) -> dict[int, dict[str, str]]:
        """The digests of the weights: by step, by tensor in the network's order."""
        path = self.folder / layout.METRICS
        try:
            return read_digests(path) if exists(path) else {}
        except OSError as error:
            raise unreadable(path, error) from None

    @cached_property
    def _metrics(self) -> tuple[list[Row], list[Row]]:
        path = self.folder / layout.METRICS
        try:
            return read_metrics(path) if exists(path) else ([], [])
        except OSError as error:
            raise unreadable(path, error) from None
        except ValueError as error:
            raise damaged(path, str(error)) from None

    @cached_property
    def history(self) -> list[Row]:
        """The lines of `history.jsonl`, in order."""
        try:
            return read_history(self.folder)
        except OSError as error:
            raise unreadable(self.folder / layout.HISTORY, error) from None

    @property
    def starts(self) -> list[Row]:
        return [row for row in self.history if row["event"] == "start"]

    @property
    def outcome(self) -> str:
        """How the last start ended: `done`, `preempted` or `failed`; "" where it has not ended, or was killed."""
        last = self.history[-1] if self.history else {}
        return str(last.get("outcome", "failed")) if last.get("event") == "end" else ""

    @property
    def state(self) -> str:
        """`done`, `not begun`, `not ended`, or how and where the last start ended, such as `preempted at step 12`."""
        if not self.begun:
            return "not begun"
        if self.done:
            return "done"
        return f"{self.outcome} at step {self.history[-1].get('step', 0)}" if self.outcome else "not ended"

    @property
    def images(self) -> dict[str, str]:
        """The SHA-256 of the images and labels that the run was last started on, by split; empty where it is not
        recorded."""
        recorded = (row.get("images") for row in reversed(self.starts))
        return next((dict(images) for images in recorded if isinstance(images, dict)), {})

    @property
    def ranks(self) -> int | None:
        """The number of ranks of the last start; None where it is not recorded."""
        recorded = (row.get("world_size") for row in reversed(self.starts))
        return self.summary.get("world_size") or next(recorded, None)

    @property
    def device(self) -> str:
        """The name of the GPU or the processor of the last start; "" where it is not recorded."""
        recorded = ((row.get("environment") or {}).get("device") for row in reversed(self.starts))
        return str(self.summary.get("device") or next(recorded, None) or "")

    def environment(self, before: int | None = None) -> dict[str, list[Any]]:
        """The environments in which the steps before `before`, or all, were computed: by dotted name its values, in
        order of time and each once."""
        starts = [row for row in self.starts if before is None or row.get("step", 0) < before]
        environments = [{**(row.get("environment") or {}), "world_size": row.get("world_size")} for row in starts]
        if not self.starts:  # earlier versions had no history, and kept the environments in the summary
            environments = self.summary.get("environments", [])
        values: dict[str, list[Any]] = {}
        for name, value in leaves(environments):
            _, _, name = name.partition(".")
            if value not in values.setdefault(name, []):
                values[name].append(value)
        return values

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints by their number of finished steps, in order."""
        return {layout.step_of(path): path for path in layout.checkpoints(layout.checkpoint_folder(self.folder))}


def intact(runs: Iterable[Run], check: Callable[[Run], object]) -> tuple[list[Run], dict[str, UserError]]:
    """The runs whose files are whole, and of the others the name of the folder and the error. check: reads the files
    that are needed. Raises the first error where no run that has begun is whole."""
    whole: list[Run] = []
    damaged: dict[str, UserError] = {}
    for run in runs:
        try:
            check(run)
        except UserError as error:
            damaged[run.folder.name] = error
        else:
            whole.append(run)
    if damaged and not any(run.begun for run in whole):
        raise next(iter(damaged.values()))
    return whole, damaged


def members(group: Path) -> list[Run]:
    """The runs of a group in order of their names, including those that were submitted and have not begun. Raises
    UserError for a folder without runs, and for that of a run."""
    if layout.is_run(group):
        raise UserError(f"{group}: is the folder of one run; name the folder above it")
    expected = read_members(group) or {}
    begun = {path.parent.name for path in group.glob(f"*/{layout.SETTINGS}") if layout.is_run(path.parent)}
    if not begun | expected.keys():
        raise UserError(f"{group}: holds no runs; name the folder above the run folders")
    # shorter names first, so that seed10 comes after seed9
    return [Run(group / name) for name in sorted(begun | expected.keys(), key=lambda name: (len(name), name))]
