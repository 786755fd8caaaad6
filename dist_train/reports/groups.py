"""The runs of a page, grouped by configuration, each with a unique name and a colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dist_train.errors import UserError
from dist_train.reports.table import Configuration, configurations
from dist_train.runs import layout
from dist_train.runs.run import Run, intact, members

COLORS = 7  # --c0 to --c6 of report.css
NAMED = 4  # the number of runs that are named where there may be more


class PageRun(NamedTuple):
    """A run on the page. name: unique on the page. color: a name in report.css."""

    run: Run
    name: str
    color: str


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, with its row of the table."""

    runs: list[PageRun]
    row: Configuration

    @property
    def name(self) -> str:
        return names(self.runs)

    @property
    def done(self) -> int:
        return self.row.done


def read(paths: Sequence[Path]) -> tuple[list[Group], list[str], list[str], list[UserError]]:
    """The runs in these folders by configuration, the settings in which the configurations differ, the runs that are
    not done, as `name (state)`, and the errors of those that are damaged. paths: run folders and groups. Raises
    UserError."""
    by_folder: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; name run folders, or the folder above them")
        for run in [Run(path)] if layout.is_run(path) else members(path):
            by_folder.setdefault(run.folder.resolve(), run)
    whole, damaged = intact(by_folder.values(), Run.check)
    keys, rows = configurations(whole)
    if not rows:
        raise UserError(f"{paths[0]}: none of its runs has begun; try again when one has")
    name_counts = Counter(run.name for row in rows for run in row.runs)
    groups, number = [], 0
    for position, row in enumerate(rows):
        page_runs = []
        for run in row.runs:
            name = run.name if name_counts[run.name] == 1 else str(run.folder)
            # a colour for each configuration or, where there is only one, for each run
            page_runs.append(PageRun(run, name, f"--c{(position if len(rows) > 1 else number) % COLORS}"))
            number += 1
        groups.append(Group(page_runs, row))
    unfinished = [f"{run.folder.name} ({run.state})" for run in whole if run.state != "done"]
    return groups, keys, [*unfinished, *(f"{name} (damaged)" for name in damaged)], [*damaged.values()]


def names(runs: Iterable[PageRun]) -> str:
    """A, B and C; of more than NAMED runs only the first, and the number of the others."""
    listed = [run.name for run in runs]
    if len(listed) > NAMED:
        listed = [*listed[: NAMED - 1], f"{len(listed) - NAMED + 1} more"]
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
