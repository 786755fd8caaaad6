"""The runs of a group side by side: accuracy as mean, standard deviation and 95 % interval over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train import config
from dist_train.data_prep.files import locked
from dist_train.files import write_atomic
from dist_train.reports.statistics import interval
from dist_train.runs.run import Member, members

_METRICS = {
    "val_accuracy": "held out, %",
    "test_accuracy": "test accuracy, %",
    "test_accuracy_tta": "with TTA, %",
}


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but the seed. values: of the settings in which the group's configurations differ."""

    values: tuple[str, ...]
    members: list[Member]

    def results(self, key: str) -> list[float]:
        """What the finished runs' summaries have under `key`."""
        found = [member.summary.get(key) for member in self.members if member.summary is not None]
        return [value for value in found if value is not None]


def configurations(found: Sequence[Member]) -> tuple[list[str], list[Configuration]]:
    """The settings in which runs that have begun differ, by dotted key and without the seed, and the runs by their
    values."""

    known = [(member, member.settings) for member in found if member.settings is not None]
    varied: set[str] = set()
    for _, settings in known:
        varied |= {*config.difference(known[0][1], settings)} - {"train.seed"}
    keys = sorted(varied)
    rows: dict[tuple[str, ...], list[Member]] = {}
    for member, settings in known:
        tree = config.to_dict(settings)
        rows.setdefault(tuple(_value(tree, key) for key in keys), []).append(member)
    return keys, [Configuration(values, same) for values, same in rows.items()]


def table(found: Sequence[Member]) -> str:
    """The group as a Markdown table, and a line for each member that is missing."""
    keys, rows = configurations(found)
    metrics = [key for key in _METRICS if any(row.results(key) for row in rows)]
    header = [*keys, "n", *(_METRICS[key] for key in metrics), "training, s"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        done = sum(member.summary is not None for member in row.members)
        of = f" of {len(row.members)}" if done < len(row.members) else ""
        cells = [_spread([100 * value for value in row.results(key)]) for key in metrics]
        seconds = f"{statistics.mean(row.results('train_seconds')):,.1f}" if done else ""
        lines.append([*row.values, f"{done}{of}", *cells, seconds])
    text = [f"| {' | '.join(line)} |" for line in lines]
    missing = [f"{member.name}: {member.missing}" for member in found if member.missing]
    return "\n".join(text + ([f"\nmissing: {', '.join(missing)}"] if missing else [])) + "\n"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    half = interval(values)
    return f"**{mean:.2f}** ± {statistics.stdev(values):.2f} (95 %: {mean - half:.2f} to {mean + half:.2f})"


def _value(tree: Any, key: str) -> str:
    """What a configuration's tree has under a dotted key, as text; "" for nothing."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)] if int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return "" if tree is None else str(tree)


def write(group: Path) -> str:
    """Write the group's table to its table.md, and return it. Safe from several members at once."""
    with locked(group / ".table.lock"):
        text = table(members(group))
        write_atomic(group / "table.md", text.encode())
    return text
