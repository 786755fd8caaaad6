"""The runs of a page: those of one configuration in a group, each with a name and a colour of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dist_train.errors import UserError
from dist_train.reports.table import Configuration, configurations
from dist_train.runs import layout
from dist_train.runs.run import Run, members

COLORS = 7  # --c0 to --c6 of report.css

NAMED = 4  # runs that are named where there may be many


class Shown(NamedTuple):
    """A run on the page. name: no other run's. color: of report.css."""

    run: Run
    name: str
    color: str


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, with its row in the table."""

    runs: list[Shown]
    row: Configuration

    @property
    def name(self) -> str:
        return names(self.runs)

    @property
    def done(self) -> int:
        return self.row.done


def read(paths: Sequence[Path]) -> tuple[list[Group], list[str], list[str]]:
    """The runs in these folders by configuration, the settings in which those differ, and who is not done, as
    `name (why)`. Raises UserError."""
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; name run folders, or the folder above them")
        for run in [Run(path)] if layout.is_run(path) else members(path):
            found.setdefault(run.folder.resolve(), run)
    keys, rows = configurations([*found.values()])
    if not rows:
        raise UserError(f"{paths[0]}: none of its runs has begun; come back when one has")
    taken = Counter(run.name for row in rows for run in row.runs)
    groups, number = [], 0
    for position, row in enumerate(rows):
        shown = []
        for run in row.runs:
            name = run.name if taken[run.name] == 1 else str(run.folder)
            # a colour for each configuration, and where there is but one for each run
            shown.append(Shown(run, name, f"--c{(position if len(rows) > 1 else number) % COLORS}"))
            number += 1
        groups.append(Group(shown, row))
    return groups, keys, [f"{run.folder.name} ({run.state})" for run in found.values() if run.state != "done"]


def names(runs: Iterable[Shown]) -> str:
    """A, B and C; the first few of many."""
    shown = [run.name for run in runs]
    if len(shown) > NAMED:
        shown = [*shown[: NAMED - 1], f"{len(shown) - NAMED + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
