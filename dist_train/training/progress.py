"""The progress of a training on the terminal: a bar over its steps, and a table row for each evaluation."""

from __future__ import annotations

import sys
import time
from typing import Any

from dist_train.errors import show, shown
from dist_train.runs.metrics import Averages, Row


class Progress:
    """A progress bar on stderr, where that is a terminal, and a table on stdout. quiet: show neither."""

    def __init__(self, total_steps: int, resume_step: int, quiet: bool) -> None:
        self._quiet, self._header_due, self._start = quiet, True, time.monotonic()
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
            accuracy = f"{100 * averages.accuracy:.1f} %"
            text = f"loss {loss:.3f}, train acc {accuracy}, {images_per_second:.0f} images/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)

    def evaluation(self, row: Row, rate: float) -> None:
        """Print a table row. row: an eval line of metrics.jsonl. rate: images per second since the last evaluation."""
        if self._quiet:
            return
        lines = []
        if self._header_due:
            lines.append("epoch  train loss  train acc  test loss  test acc  images/s  elapsed s")
            self._header_due = False
        cells = [
            f"{row['epoch']:5g}",
            _cell(row["train_loss"], "10.4f"),
            _cell(row["train_accuracy"], "7.2%"),
            _cell(row["test_loss"], "9.4f"),
            _cell(row["test_accuracy"], "6.2%"),
            f"{rate:8.0f}",
            f"{time.monotonic() - self._start:9.1f}",
        ]
        lines.append("  ".join(cells))
        self._print(sys.stdout, *lines)

    def phase(self, name: str) -> None:
        """Show on the bar what runs between two steps, such as an evaluation."""
        if self._bar is not None:
            self._bar.set_postfix_str(name)

    def warn(self, sentence: str) -> None:
        """Print a sentence to stderr, above the bar."""
        self._print(sys.stderr, sentence)

    def close(self) -> None:
        """Remove the bar: no more steps follow. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, stream: Any, *lines: str) -> None:
        if self._bar is None:
            show(*lines, stream=stream)
            return
        for line in lines:
            self._bar.write(shown(line, stream), file=stream)  # clears the bar, prints, and draws the bar again


def _cell(value: float | None, spec: str) -> str:
    """A number formatted for its column; None, which stands for a number that is not finite, as `nan`."""
    number = float("nan") if value is None else value
    if not spec.endswith("%"):
        return f"{number:{spec}}"
    return f"{100 * number:{spec[:-1]}f} %"
