"""The runs of a group side by side: accuracy as mean, standard deviation and 95 % interval over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train import config
from dist_train.data_prep.files import locked
from dist_train.errors import UserError
from dist_train.files import write_atomic
from dist_train.reports import markdown
from dist_train.reports.statistics import spread
from dist_train.runs import layout
from dist_train.runs.run import Run, intact, members

IMAGES = "images"  # the column that tells runs apart which have the same settings, and were trained on other images
_METRICS = {
    "val_accuracy": "held out, %",
    "test_accuracy": "test accuracy, %",
    "test_accuracy_tta": "with TTA, %",
}


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but the seed, on the same images. values: as text, of the settings in which the
    group's configurations differ."""

    values: tuple[str, ...]
    runs: list[Run]

    @property
    def done(self) -> int:
        """The number of runs that are done."""
        return sum(run.done for run in self.runs)

    def results(self, key: str) -> list[float]:
        """The values of a key in the summaries of the runs that are done and have it."""
        values = [run.summary.get(key) for run in self.runs]
        return [value for value in values if value is not None]


def configurations(runs: Sequence[Run]) -> tuple[list[str], list[Configuration]]:
    """The settings in which the runs that have begun differ, by dotted key and without the seed; and these runs,
    grouped by the values. Where runs with the same values were trained on different images, IMAGES is one of the keys;
    its values are the first digits of their SHA-256. Raises UserError."""
    begun = [run for run in runs if run.begun]
    varied: set[str] = set()
    for run in begun:
        varied |= {*config.difference(begun[0].settings, run.settings)} - {"train.seed"}
    keys = sorted(varied)
    rows: dict[tuple[str, ...], list[Run]] = {}
    for run in begun:
        tree = config.to_dict(run.settings)
        rows.setdefault(tuple(_value(tree, key) for key in keys), []).append(run)
    if any(len({_images(run) for run in same} - {""}) > 1 for same in rows.values()):
        keys.append(IMAGES)
        of_images: dict[tuple[str, ...], list[Run]] = {}
        for values, same in rows.items():
            for run in same:
                of_images.setdefault((*values, _images(run) or "not recorded"), []).append(run)
        rows = of_images
    return keys, [Configuration(values, same) for values, same in rows.items()]


def _images(run: Run) -> str:
    """The images of a run as the first digits of their SHA-256, "" where that is not recorded."""
    return " ".join(f"{split} {sha256[:8]}" for split, sha256 in run.images.items())


def table(runs: Sequence[Run], damaged: Collection[str] = ()) -> str:
    """The runs as a Markdown table, with a line below that names those that are not done, and those that are damaged.
    Raises UserError."""
    keys, rows = configurations(runs)
    metrics = [key for key in _METRICS if any(row.results(key) for row in rows)]
    header, lines = [*keys, "n", *(_METRICS[key] for key in metrics), "training, s"], []
    for row in rows:
        of = f" of {len(row.runs)}" if row.done < len(row.runs) else ""
        cells = [spread([100 * value for value in row.results(key)]) for key in metrics]
        seconds = f"{statistics.mean(row.results('train_seconds')):,.1f}" if row.done else ""
        lines.append([*map(markdown.literal, row.values), f"{row.done}{of}", *cells, seconds])
    missing = [f"{markdown.literal(run.folder.name)}: {run.state}" for run in runs if run.state != "done"]
    missing += [f"{markdown.literal(name)}: damaged" for name in damaged]
    return markdown.table(header, lines) + (f"\nmissing: {', '.join(missing)}\n" if missing else "")


def _value(tree: Any, key: str) -> str:
    """The value of a dotted key in a configuration's tree, as text; "" where the tree lacks it."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)] if int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return "" if tree is None else str(tree)


def write(group: Path) -> tuple[str, list[UserError]]:
    """Write the group's table to its table.md, and return it, with the errors of runs that are damaged and therefore
    not in it. Several processes may call it at once. Raises UserError."""
    if not group.is_dir():
        raise UserError(f"{group}: there is no such folder; name the folder above the run folders")
    path = group / layout.TABLE
    try:
        with locked(layout.table_lock_path(group)):
            runs, damaged = intact(members(group), Run.check_results)
            text = table(runs, damaged)
            write_atomic(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or change its permissions") from None
    return text, [*damaged.values()]
