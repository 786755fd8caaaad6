"""The runs of a group side by side: accuracy as mean, standard deviation and 95 % interval over the seeds.

    python -m dist_train.table GROUP

GROUP is a folder of run folders, as an array of jobs makes it. Runs that differ in more than the seed get a row for
each of their configurations. What has not finished is named, and the table made of the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.data_prep.files import locked
from dist_train.errors import UserError, command
from dist_train.files import write_atomic
from dist_train.record import SUMMARY, read_history

if TYPE_CHECKING:
    from dist_train.config import Config

MEMBERS = "members.json"  # {name of the run folder: its settings}, as submitted
SETTINGS = "config.toml"
_METRICS = {
    "val_accuracy": "held out, %",
    "test_accuracy": "test accuracy, %",
    "test_accuracy_tta": "with TTA, %",
}


@dataclass(frozen=True)
class Member:
    """A run of the group: its settings if it has begun, its summary if it is done, and otherwise why not."""

    folder: Path
    settings: Config | None
    summary: dict[str, Any] | None
    missing: str = ""

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but the seed. values: of the settings in which the group's configurations differ."""

    values: tuple[str, ...]
    members: list[Member]

    def results(self, key: str) -> list[float]:
        """What the finished runs' summaries have under `key`."""
        found = [member.summary.get(key) for member in self.members if member.summary is not None]
        return [value for value in found if value is not None]


def members(group: Path) -> list[Member]:
    """The runs of a group by name, those that are expected but not there included. Raises UserError."""
    expected = json.loads((group / MEMBERS).read_text()) if (group / MEMBERS).exists() else {}
    begun = {path.parent.name for path in group.glob(f"*/{SETTINGS}")} if group.is_dir() else set()
    if not begun | expected.keys():
        raise UserError(f"{group}: holds no runs; name the folder above the run folders")
    # seed10 after seed9
    return [member(group / name) for name in sorted(begun | expected.keys(), key=lambda name: (len(name), name))]


def member(folder: Path) -> Member:
    """The run in a folder. Raises UserError where its settings cannot be read."""
    from dist_train import config  # takes the seconds that torch takes

    if not (folder / SETTINGS).exists():
        return Member(folder, None, None, "not begun")
    settings = config.load(None, folder / SETTINGS, [])
    if (folder / SUMMARY).exists():
        return Member(folder, settings, json.loads((folder / SUMMARY).read_text()))
    last = read_history(folder)[-1:]
    ended = bool(last) and last[0]["event"] == "end"
    return Member(folder, settings, None, f"{last[0]['outcome']} at step {last[0]['step']}" if ended else "not ended")


def configurations(found: Sequence[Member]) -> tuple[list[str], list[Configuration]]:
    """The settings in which runs that have begun differ, by dotted key and without the seed, and the runs by their
    values."""
    from dist_train import config

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


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval by Student's t, infinite for one value."""
    from scipy.stats import t as student  # a second, which not every node of a job has to spend

    n = len(values)
    if n < 2:
        return math.inf
    return float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def proportion(right: int, n: int) -> tuple[float, float]:
    """The ends of the 95 % interval by Wilson of the chance of which `right` of `n` trials are a sample."""
    from scipy.stats import binomtest

    found = binomtest(right, n).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


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


@command
def main() -> int:
    described = argparse.ArgumentParser(
        prog="python -m dist_train.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("group", metavar="GROUP", type=Path, help="a folder of run folders")
    print(write(described.parse_args().group), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
