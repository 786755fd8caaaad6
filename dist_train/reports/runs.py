"""The runs of a report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.config.settings import Config
from dist_train.errors import UserError
from dist_train.reports.table import Configuration, configurations
from dist_train.runs.history import read_history
from dist_train.runs.layout import EVALUATION, METRICS, SETTINGS
from dist_train.runs.metrics import Row, read_metrics
from dist_train.runs.run import Member, member, members

COLORS = 7  # --c0 to --c6 of report.css
NAMED = 4  # runs that are named where there may be many


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds. name: as it is shown, no other run's. color: a colour of report.css."""

    member: Member
    settings: Config
    name: str
    steps: list[Row]
    evals: list[Row]
    history: list[Row]
    evaluation: Row | None
    color: str = ""

    @property
    def folder(self) -> Path:
        return self.member.folder

    @property
    def summary(self) -> Row:
        """Empty before the run's end."""
        return self.member.summary or {}

    @property
    def starts(self) -> list[Row]:
        return [row for row in self.history if row["event"] == "start"]

    @property
    def ranks(self) -> int | None:
        """Of its last start; None where that is not recorded."""
        return self.summary.get("world_size") or next((row.get("world_size") for row in self.starts[::-1]), None)

    @property
    def device(self) -> str:
        return str(self.summary.get("device") or next((_device(row) for row in self.starts[::-1]), ""))


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, with its row in the table."""

    runs: list[Run]
    row: Configuration

    @property
    def name(self) -> str:
        return names(self.runs)

    @property
    def done(self) -> int:
        return sum(run.member.summary is not None for run in self.runs)


def read(paths: Sequence[Path]) -> tuple[list[Group], list[str], list[str]]:
    """The runs in these folders by configuration, the settings in which those differ, and who is not finished, as
    `name (why)`. Raises UserError."""
    found: dict[Path, Member] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; name run folders, or the folder above them")
        for each in [member(path)] if (path / SETTINGS).exists() else members(path):
            found.setdefault(each.folder.resolve(), each)
    runs = {id(each): _run(each, each.settings) for each in found.values() if each.settings is not None}
    if not runs:
        raise UserError(f"{paths[0]}: none of its runs has begun; come back when one has")
    taken = Counter(run.name for run in runs.values())
    keys, rows = configurations([*found.values()])
    groups, number = [], 0
    for position, row in enumerate(rows):
        same = []
        for each in row.members:
            run = runs[id(each)]
            name = run.name if taken[run.name] == 1 else str(run.folder)
            # a colour for each configuration, and where there is but one for each run
            color = f"--c{(position if len(rows) > 1 else number) % COLORS}"
            same.append(dataclasses.replace(run, name=name, color=color))
            number += 1
        groups.append(Group(same, row))
    return groups, keys, [f"{each.name} ({each.missing})" for each in found.values() if each.missing]


def _run(found: Member, settings: Config) -> Run:
    folder = found.folder
    try:
        steps, evals = read_metrics(folder / METRICS) if (folder / METRICS).exists() else ([], [])
        path = folder / EVALUATION
        evaluation = json.loads(path.read_text()) if path.exists() else None
        name = settings.record.name or folder.resolve().name
        return Run(found, settings, name, steps, evals, read_history(folder), evaluation)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); leave this run out") from None
    except ValueError as error:
        raise UserError(f"{folder} holds a damaged file ({error}); leave this run out") from None


def _device(start: Row) -> str:
    return str((start.get("environment") or {}).get("device", ""))


def names(runs: Iterable[Run]) -> str:
    names = [run.name for run in runs]
    if len(names) > NAMED:
        names = [*names[: NAMED - 1], f"{len(names) - NAMED + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
