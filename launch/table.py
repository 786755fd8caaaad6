"""The runs of a group side by side: accuracy as mean, standard deviation and 95 % interval over the seeds.

    python -m launch.table GROUP

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
from typing import Any

from data_prep.files import locked
from dist_train import config
from dist_train.errors import UserError, say
from dist_train.files import write_atomic
from dist_train.record import SUMMARY, read_history

MEMBERS = "members.json"  # {name of the run folder: its settings}, as submitted
_METRICS = {"test_accuracy": "test accuracy, %", "test_accuracy_tta": "with TTA, %"}


@dataclass(frozen=True)
class Member:
    """A run of the group: its settings if it has begun, its summary if it is done, and otherwise why not."""

    name: str
    settings: config.Config | None
    summary: dict[str, Any] | None
    missing: str = ""


def members(group: Path) -> list[Member]:
    """The runs of a group by name, those that are expected but not there included. Raises UserError."""
    expected = json.loads((group / MEMBERS).read_text()) if (group / MEMBERS).exists() else {}
    begun = {path.parent.name for path in group.glob("*/config.toml")} if group.is_dir() else set()
    if not begun | expected.keys():
        raise UserError(f"{group}: holds no runs; name the folder above the run folders")
    # seed10 after seed9
    return [_member(group / name) for name in sorted(begun | expected.keys(), key=lambda name: (len(name), name))]


def _member(folder: Path) -> Member:
    if not (folder / "config.toml").exists():
        return Member(folder.name, None, None, "not begun")
    settings = config.load(None, folder / "config.toml", [])
    if (folder / SUMMARY).exists():
        return Member(folder.name, settings, json.loads((folder / SUMMARY).read_text()))
    last = read_history(folder)[-1:]
    ended = bool(last) and last[0]["event"] == "end"
    return Member(
        folder.name, settings, None, f"{last[0]['outcome']} at step {last[0]['step']}" if ended else "not ended"
    )


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval by Student's t, infinite for one value."""
    from scipy.stats import t as student  # a second, which not every node of a job has to spend

    n = len(values)
    if n < 2:
        return math.inf
    return float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def table(found: Sequence[Member]) -> str:
    """The group as a Markdown table, and a line for each member that is missing."""
    known = [(member, member.settings) for member in found if member.settings is not None]
    varied: set[str] = set()
    for _, settings in known:
        varied |= {*config.difference(known[0][1], settings)} - {"train.seed"}
    keys = sorted(varied)
    rows: dict[tuple[str, ...], list[Member]] = {}
    for member, settings in known:
        rows.setdefault(tuple(_value(settings, key) for key in keys), []).append(member)
    metrics = [key for key in _METRICS if any(key in (member.summary or {}) for member, _ in known)]
    header = [*keys, "n", *(_METRICS[key] for key in metrics), "training, s"]
    lines = [header, ["---"] * len(header)]
    for values, same in rows.items():
        done = [member.summary for member in same if member.summary is not None]
        of = f" of {len(same)}" if len(done) < len(same) else ""
        cells = [_spread([100 * summary[key] for summary in done if key in summary]) for key in metrics]
        seconds = f"{statistics.mean(summary['train_seconds'] for summary in done):,.1f}" if done else ""
        lines.append([*values, f"{len(done)}{of}", *cells, seconds])
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


def _value(settings: config.Config, key: str) -> str:
    node: Any = config.to_dict(settings)
    for part in key.split("."):
        if isinstance(node, list):
            node = node[int(part)] if int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return "" if node is None else str(node)


def write(group: Path) -> str:
    """Write the group's table to its table.md, and return it. Safe from several members at once."""
    with locked(group / ".table.lock"):
        text = table(members(group))
        write_atomic(group / "table.md", text.encode())
    return text


def main() -> int:
    described = argparse.ArgumentParser(
        prog="python -m launch.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("group", metavar="GROUP", type=Path, help="a folder of run folders")
    try:
        print(write(described.parse_args().group), end="")
    except UserError as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
