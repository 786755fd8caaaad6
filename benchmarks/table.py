"""Markdown tables, and the conditions of a measurement."""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from dist_train.runs.environment import device_name, git_commit


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile; of one value, three times the value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, middle, last = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, last


def spread(values: list[float], digits: int) -> str:
    """The median and the quartiles, as text with this number of decimals."""
    first, middle, last = quartiles(values)
    return f"{middle:,.{digits}f} ({first:,.{digits}f}..{last:,.{digits}f})"


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    return "\n".join([row(header), row("---" for _ in header), *map(row, rows)])


def measured_on(device: torch.device, cores: int, *more: str) -> str:
    """Day, commit, hardware and versions, in one line. more: commits of other programs."""
    commit = git_commit() or "none"
    parts = [
        time.strftime("%Y-%m-%d"),
        f"commit {commit[:7]}{'+' * commit.endswith('+')}",
        device_name(device) + f", {cores} cores" * (device.type == "cpu"),
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    return "; ".join([*parts, *more])


def command(module: str) -> str:
    """The command line that this process was started with."""
    return f"python -m {module} {shlex.join(sys.argv[1:])}".rstrip()


def publish(module: str, conditions: str, markdown: str, out: Path | None) -> None:
    """Print the table of a benchmark with its conditions and its command, and append it to `out`."""
    text = f"{conditions}\n\n```bash\n{command(module)}\n```\n\n{markdown}\n"
    print(text)
    if out:
        append(out, text)


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
