"""`metrics.jsonl`, the metrics of a run, from which its plots and reports are made; and `evaluation.json`.

`metrics.jsonl` holds one JSON object a line, in the order of training:

- `{"kind": "step", "step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "correct", "images", "flops"}`
  for each optimizer step. `step` counts from 1, `epoch` is a fraction, `loss` is the mean over the images that were
  trained on, which are the global batch or, with `train.select`, those kept of it, `grad_norm` the norm of the whole
  gradient, `correct` of `images` were classified right in training mode, with `flops` floating-point operations forward
  and backward, and of choosing the images.
- `{"kind": "eval", "step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "coefficients"}`,
  with `val_loss` and `val_accuracy` where there is a validation set; in the last one also `*_tta`, with test-time
  augmentation, where that is configured. Accuracies are fractions from 0 to 1. `coefficients` has, for each block
  and each of its convolutions, the mean and the standard deviation of the mixing coefficient over the test images.
- `{"kind": "weights", "step", "digests"}`: digests of the weights after `step`, before its evaluation: by each tensor's
  name, in the network's order, the first 16 hexadecimal digits of the SHA-256 of its bytes.

A number that is not finite is written as `null`. Runs with the same weights have the same lines, except for
`images_per_second`. Times and machines are in `history.jsonl`.

`evaluation.json` is the last evaluation in full: `{"dataset", "split", "step", "images", "loss", "accuracy",
"classes", "confusion", "calibration", "coefficients", "wrong"}` and, with test-time augmentation, `*_tta`.
`confusion[i][j]` images of class i were classified as class j. `calibration` is `{"ece", "bins": [{"from", "count",
"confidence", "accuracy"}]}`. `coefficients` has for each block `{"branches", "mean", "std", "by_class"}`: names,
mean and standard deviation for each convolution, and for each class the mean of each. `wrong` lists the wrong answers
of the highest confidence, `{"index", "label", "predicted", "confidence", "png"}`, the image in base64.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_train.data_prep.files import sync
from dist_train.errors import LostRecordError, UserError
from dist_train.files import write_atomic
from dist_train.runs.contents import metrics_line
from dist_train.runs.layout import EVALUATION, METRICS

Row = dict[str, Any]
KINDS = ("step", "weights", "eval")  # of the lines of metrics.jsonl
# what resuming requires of a line; those of earlier versions, which are shown all the same, may have less
_RESUMED = {
    "step": {"images_per_second", "correct", "images", "flops"},
    "eval": {"test_loss", "train_loss", "train_accuracy"},
}


class MetricsFile:
    """Writes `metrics.jsonl` of one run, on rank 0 only.

    A full disk does not stop the run: lines that cannot be written wait in memory and are tried again with each
    later one; only `flush` raises for them. Every method that adds a line raises LostRecordError where the file is no
    longer at its path.

    last_step: the last step in the file. last_eval: the last eval line. averages: over the steps after that line.
    """

    def __init__(self, run_dir: Path, resume_step: int, warn: Callable[[str], None]) -> None:
        """Open the file, and truncate it to `resume_step` where a run is resumed.

        Args:
            run_dir: the run folder; created if it is missing.
            resume_step: steps finished at the checkpoint, 0 for a new run. Later steps will be trained again:
                their lines are removed, as is a torn last line.
            warn: receives a sentence for the user when lines cannot be written, and when they can be again.

        Raises:
            UserError: lines up to `resume_step` are missing.
            OSError: the run folder cannot be written.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self.last_step = 0
        self.last_eval: Row | None = None
        self.averages = Averages()
        self._warn, self._path = warn, run_dir / METRICS
        self._last_digests = 0
        self._restore(resume_step)
        self._path.touch()
        self._file = self._path.open("r+b", buffering=0)
        # The first `synced` bytes of the file are known to be on the disk. `_lines` has the bytes after them, because a
        # network file system may lose written ones and report it only at the next fsync; the first `_written` bytes
        # of `_lines` are in the file.
        self.synced, self._written, self._lines = self._path.stat().st_size, 0, bytearray()
        self._stuck = False  # the last write failed
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        sync(run_dir)

    def step(self, row: Row) -> None:
        """Append the line of one finished optimizer step; steps come in order, singly or in groups.

        row: all but `kind` of a step line.

        Raises:
            ValueError: the step does not follow the step before.
        """
        step = row["step"]
        if step != self.last_step + 1:
            raise ValueError(f"step {step} was recorded after step {self.last_step}")
        self._append({"kind": "step", **row})
        self.last_step = step
        self.averages.add(row)

    def weights(self, step: int, digests: dict[str, str]) -> None:
        """Append digests of the weights after `step`, before its evaluation, unless the file has them already.

        digests: by tensor, in the network's order, 16 hexadecimal digits of the SHA-256 of its bytes.

        Raises:
            ValueError: `step` is not the last step in the file.
        """
        if step != self.last_step:
            raise ValueError(f"digests after step {step} came when step {self.last_step} was the last")
        if self._last_digests != step:
            self._append({"kind": "weights", "step": step, "digests": digests})
            self._last_digests = step

    def evaluation(self, row: Row) -> Row | None:
        """Append an evaluation after the last step, and return its line; None where the file has it already, as in a
        run that is resumed right after an evaluation.

        row: all but `kind`, `train_loss` and `train_accuracy`, which are averaged over the training steps since the
        previous evaluation.

        Raises:
            ValueError: the step is not the last step in the file.
        """
        if row["step"] != self.last_step:
            raise ValueError(f"an evaluation after step {row['step']} came when step {self.last_step} was the last")
        if self.last_eval is not None and self.last_eval["step"] == row["step"]:
            return None
        training = {"train_loss": self.averages.loss, "train_accuracy": self.averages.accuracy}
        line: Row = finite({"kind": "eval", "step": row["step"], "epoch": row["epoch"], **training, **row})
        self._append(line)
        self.last_eval = line
        self.averages = Averages()
        return line

    def flush(self) -> None:
        """Write every line to the disk; must be called, in any thread, before a checkpoint is written.

        Raises:
            OSError: some lines could not be written; a run could not be resumed from a checkpoint after them.
        """
        with self._flushing:
            with self._lock:
                failure = self._write()
                end = self.synced + self._written
            if failure is None:
                try:
                    os.fsync(self._file.fileno())  # without the lock: it is slow, and other threads may append
                except OSError as error:
                    failure = error
                    with self._lock:
                        self._written = 0  # all of `_lines` is written again
            if failure is not None:
                raise OSError(failure.errno, failure.strerror, str(self._path)) from failure
            with self._lock:
                done = end - self.synced
                del self._lines[:done]
                self.synced, self._written = end, self._written - done

    def close(self) -> None:
        """Write what can be written, and close the file. A second call does nothing."""
        if not self._file.closed:
            with self._lock:
                self._write()
            self._file.close()

    def _restore(self, resume_step: int) -> None:
        """Truncate the file to `resume_step`, and restore the averages and the last evaluation from its lines."""
        remedy = "restore the file that belongs to the checkpoint, or start in a new run folder"
        data = self._path.read_bytes() if self._path.exists() else b""
        keep = 0
        for row, end in _rows(data):
            if row["step"] > resume_step or not row.keys() >= _RESUMED.get(row["kind"], set()):
                break
            if row["kind"] == "eval":
                self.last_eval = row
                self.averages = Averages()
            elif row["kind"] == "weights":
                self._last_digests = row["step"]
            elif row["step"] != self.last_step + 1:
                raise UserError(f"{self._path} goes from step {self.last_step} to step {row['step']}; {remedy}")
            else:
                self.last_step = row["step"]
                self.averages.add(row)
            keep = end
        if self.last_step != resume_step:
            raise UserError(
                f"{self._path} has whole lines up to step {self.last_step}, but the checkpoint to "
                f"resume is at step {resume_step}; {remedy}"
            )
        if keep != len(data):
            write_atomic(self._path, data[:keep])

    def _append(self, row: Row) -> None:
        self._check_place()
        line = (json.dumps(finite(row), allow_nan=False) + "\n").encode()
        with self._lock:
            self._lines += line
            self._write()

    def _check_place(self) -> None:
        """Raises LostRecordError where the path no longer leads to the open file, which then nobody would find."""
        try:
            here = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            here = False
        except OSError:  # the file system does not answer, which is no loss
            here = True
        if not here:
            raise LostRecordError(
                f"{self._path} is not the file that this run writes any more: it or its folder was moved, replaced or "
                f"deleted; move it back, or give its new place as --run-dir, and start the same command again"
            )

    def _write(self) -> OSError | None:
        """Write the lines that are not in the file yet; those that fail stay for the next call. The lock must be
        held."""
        file, failure = self._file.fileno(), None
        try:
            while self._written < len(self._lines):  # a write to a disk that fills up may be partial
                self._written += os.pwrite(file, self._lines[self._written :], self.synced + self._written)
        except OSError as error:
            failure = error
            self._written = self._lines.rfind(b"\n", 0, self._written) + 1
            with contextlib.suppress(OSError):  # otherwise the torn line is overwritten by the next attempt
                os.ftruncate(file, self.synced + self._written)
        if failure is not None and not self._stuck:
            self._warn(
                f"{self._path} cannot be written ({failure.strerror}); free space on its disk: training continues and "
                f"keeps the lines in memory, but no checkpoint can be written until then"
            )
        elif failure is None and self._stuck:
            self._warn(f"{self._path} can be written again; none of its lines is missing")
        self._stuck = failure is not None
        return failure


class Averages:
    """Means over step lines: loss and accuracy over the images, rate in images per second."""

    def __init__(self) -> None:
        self._images = self._correct = 0
        self._loss = self._seconds = 0.0

    def add(self, row: Row) -> None:
        images, loss, rate = row["images"], row["loss"], row["images_per_second"]
        self._images += images
        self._correct += row["correct"]
        # A loss that is not finite is null in a line that was read back; both must give the same sum.
        self._loss += images * (loss if loss is not None and math.isfinite(loss) else math.nan)
        self._seconds += images / rate if rate else math.nan

    @property
    def loss(self) -> float:
        return self._loss / self._images if self._images else math.nan

    @property
    def accuracy(self) -> float:
        return self._correct / self._images if self._images else math.nan

    @property
    def rate(self) -> float:
        return self._images / self._seconds if self._seconds else math.nan


def read_metrics(path: Path) -> tuple[list[Row], list[Row]]:
    """The step lines and the eval lines of a `metrics.jsonl`, without a torn last line. `read_digests` reads the
    others.

    Raises:
        ValueError: a line before the last is not valid.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    rows: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    good = 0
    for row, end in _rows(data):
        rows[row["kind"]].append(row)
        good = end
    if b"\n" in data[good:-1]:
        line = data.count(b"\n", 0, good) + 1
        raise ValueError(f"line {line} of {path.name} is not a line of metrics")
    return rows["step"], rows["eval"]


def read_digests(path: Path) -> dict[int, dict[str, str]]:
    """The digests of a `metrics.jsonl`: by step, by tensor in the network's order. Raises OSError."""
    return {row["step"]: row["digests"] for row, _ in _rows(path.read_bytes()) if row["kind"] == "weights"}


def best_eval(evals: list[Row]) -> Row | None:
    """The eval line of the highest test accuracy, the earliest of several; None without any.

    For plots only, because it is chosen on the test set: the result of a run is its last evaluation.
    """
    scored = [row for row in evals if row["test_accuracy"] is not None]
    return max(scored, key=lambda row: row["test_accuracy"], default=None)


def write_evaluation(run_dir: Path, details: Row) -> None:
    """Write `evaluation.json`. Raises OSError."""
    write_atomic(run_dir / EVALUATION, (json.dumps(finite(details)) + "\n").encode())


def _rows(data: bytes) -> Iterator[tuple[Row, int]]:
    """Each line's object and the offset after the line, up to the first line that is torn or not valid."""
    start = 0
    while (end := data.find(b"\n", start) + 1) > 0:
        if (row := metrics_line(data[start:end])) is None:
            return
        yield row, end
        start = end


def finite(value: Any) -> Any:
    """`value`, which may be nested, with None for every float that is not finite, as JSON requires."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # float(): a numpy scalar becomes a plain one
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
