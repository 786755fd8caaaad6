"""The progress of a training on the terminal: a bar over its steps, and a table row for each evaluation."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from dist_train.errors import show
from dist_train.runs.metrics import Averages, Row

_DROPPED = ("elapsed s", "images/s", "train loss", "train acc", "test loss")  # of the table, in this order
_BAR = 46  # characters of the bar's line beside the metrics


class Progress:
    """A progress bar on stderr, where that is a terminal, and a table on stdout. On a narrow terminal both drop
    what would not fit into a line. quiet: show neither."""

    def __init__(self, total_steps: int, resume_step: int, quiet: bool) -> None:
        self._quiet, self._start = quiet, time.monotonic()
        self._names: list[str] = []  # of the table's columns, once it has begun
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm  # only where there is a terminal

            self._bar = tqdm(
                total=total_steps,
                initial=resume_step,
                file=sys.stderr,
                dynamic_ncols=True,
                leave=False,
                bar_format="{percentage:3.0f} %|{bar}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
            )

    def step(self, averages: Averages, loss: float, images_per_second: float) -> None:
        """Advance the bar by one step. averages: since the last evaluation. loss: mean over the step's images."""
        if self._bar is not None:
            metrics = f"loss {loss:.3f}, train acc {100 * averages.accuracy:.1f} %, {images_per_second:.0f} images/s"
            while len(metrics) > max(10, _columns() - _BAR) and ", " in metrics:
                metrics = metrics.rpartition(", ")[0]
            self._bar.set_postfix_str(metrics, refresh=False)
            self._bar.update(1)

    def evaluation(self, row: Row, rate: float) -> None:
        """Print a table row. row: an eval line of metrics.jsonl. rate: images per second since the last evaluation."""
        if self._quiet:
            return
        cells = {
            "epoch": f"{row['epoch']:g}",
            "train loss": _cell(row["train_loss"], ".4f"),
            "train acc": _cell(row["train_accuracy"], ".2%"),
            "test loss": _cell(row["test_loss"], ".4f"),
            "test acc": _cell(row["test_accuracy"], ".2%"),
            "images/s": f"{rate:.0f}",
            "elapsed s": f"{time.monotonic() - self._start:.1f}",
        }
        if not self._names:
            self._names, droppable = [*cells], [*_DROPPED]
            while sys.stdout.isatty() and droppable and len("  ".join(self._names)) > _columns():
                self._names.remove(droppable.pop(0))
            show("  ".join(self._names))
        show("  ".join(cells[name].rjust(len(name)) for name in self._names))
        if self._bar is not None and sys.stdout.isatty():  # through a pipe the row may come after the bar
            self._bar.refresh()

    def phase(self, name: str) -> None:
        """Show on the bar what runs between two steps, such as an evaluation."""
        if self._bar is not None:
            self._bar.set_postfix_str(name)

    def warn(self, sentence: str) -> None:
        """Print a sentence to stderr, above the bar."""
        show(sentence, stream=sys.stderr)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Remove the bar: no more steps follow. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _columns() -> int:
    """The width of the terminal in characters."""
    return shutil.get_terminal_size().columns


def _cell(value: float | None, spec: str) -> str:
    """A number formatted for its column; None, which stands for a number that is not finite, as `nan`."""
    number = float("nan") if value is None else value
    if not spec.endswith("%"):
        return f"{number:{spec}}"
    return f"{100 * number:{spec[:-1]}f} %"
