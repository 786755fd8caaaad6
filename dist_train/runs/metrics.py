"""The run folder's record on rank 0: `metrics.jsonl` is written first, everything else reads from it.

`metrics.jsonl` holds one JSON object a line, in the order of training:

- `{"kind": "step", "step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "correct", "images", "flops"}`
  for each optimizer step. `step` counts from 1, `epoch` is a fraction, `loss` is the mean over the global batch,
  `grad_norm` the norm of its whole gradient, `correct` of `images` were classified right in training mode, with
  `flops` floating-point operations forward and backward.
- `{"kind": "eval", "step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "coefficients"}`,
  with `val_loss` and `val_accuracy` where there is a validation set; in the last one also `*_tta`, with test-time
  augmentation, where that was asked for. Accuracies are fractions from 0 to 1. `coefficients` has, for each block
  and each of its convolutions, the mean and the standard deviation of the mixing coefficient over the test images.
- `{"kind": "weights", "step", "digests"}` before the evaluation: by each tensor's name, in the network's
  order, the first 16 hexadecimal digits of the SHA-256 of its bytes after `step`.

A number that is not finite is written as `null`. Runs of the same weights have the same lines, apart from
`images_per_second`. What may differ between them is in `history.jsonl`: when and where the run was started,
how it ended, what went wrong; `{"event", "time", ...}` a line.

`evaluation.json` is the last evaluation in full: `{"dataset", "split", "step", "images", "loss", "accuracy",
"classes", "confusion", "calibration", "coefficients", "wrong"}` and, with test-time augmentation, `*_tta`.
`confusion[i][j]` images of class i were taken for class j. `calibration` is `{"ece", "bins": [{"from", "count",
"confidence", "accuracy"}]}`. `coefficients` has for each block `{"branches", "mean", "std", "by_class"}`: names,
mean and standard deviation for each convolution, and for each class the mean of each. `wrong` lists the wrong answers
of the highest confidence, `{"index", "label", "predicted", "confidence", "png"}`, the image in base64.

`system/rank-N.jsonl`, where that is asked for, is each rank's own: see system.py.

This module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_train.config.settings import RecordConfig
from dist_train.data_prep.files import sync
from dist_train.errors import UserError
from dist_train.files import write_atomic
from dist_train.runs.layout import EVALUATION, METRICS, SUMMARY

Row = dict[str, Any]

KINDS = ("step", "weights", "eval")  # of the lines of metrics.jsonl


class Recorder:
    """Writes the record of one run and shows it: W&B, a progress bar, a table row per evaluation.

    Only rank 0 makes one. W&B has a process of its own that reads the file; it is never waited for, except
    for a bounded time in `close`.

    A full disk does not stop the run: lines that cannot be written wait in memory, are tried again with each
    later one, and are missed only by `flush` and `finish`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RecordConfig,
        *,
        dataset: str,
        run_config: Row,
        total_steps: int,
        resume_step: int,
        matrix_rate: float = math.nan,
        branches: Sequence[Sequence[str]] = (),
    ) -> None:
        """Open the record, and cut it back to `resume_step` where a checkpoint is being resumed.

        Args:
            run_dir: the run folder; made if it is not there.
            dataset: the data set's name, for plot titles and `summary.json`.
            run_config: the whole configuration, and what else W&B shall show with it.
            total_steps: optimizer steps of the whole run.
            resume_step: steps finished at the checkpoint, 0 for a new run. Lines after it will be
                replayed and are removed, as is a torn last line.
            matrix_rate: floating-point operations a second of matrix products on all ranks, for W&B's MFU.
            branches: for each block the names of its convolutions, for W&B's mixing coefficients.

        Raises:
            UserError: the lines up to `resume_step` are not all there.
            OSError: the run folder cannot be written.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self.evals: list[Row] = []  # every eval line so far, those before a resume included
        self._dir, self._dataset, self._quiet, self._artifacts = run_dir, dataset, config.quiet, config.artifacts
        self._name = config.name or run_dir.resolve().name
        self.last_step = 0  # the newest step that was recorded
        self._last_digests, self._sums = 0, _Sums()
        self._path = run_dir / METRICS
        self._restore(resume_step)
        self._path.touch()
        self._file = self._path.open("r+b", buffering=0)
        # The first `_synced` bytes of the file are known to be on the disk. The lines after them are kept, for a
        # network file system may lose written ones and say so only at the next fsync; the first `_written` bytes
        # of them are in the file.
        self._synced, self._written, self._lines = self._path.stat().st_size, 0, bytearray()
        self._stuck = False  # the last write failed
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        sync(run_dir)
        self._start, self._header_due = time.monotonic(), True
        self._bar: Any = None
        if not config.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=resume_step,
                file=sys.stderr,
                dynamic_ncols=True,
                leave=False,
                bar_format="{percentage:3.0f} %|{bar}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
            )
        self._wandb: Any = None
        if config.wandb != "disabled":
            from dist_train.tracking.client import WandbRun, beginning

            self._wandb = WandbRun.start(
                beginning(
                    run_dir,
                    config,
                    config=run_config,
                    branches=branches,
                    offset=self._synced,
                    matrix_rate=matrix_rate,
                )
            )

    def step(
        self,
        *,
        step: int,
        epoch: float,
        loss: float,
        lr: float,
        grad_norm: float,
        images_per_second: float,
        correct: int,
        images: int,
        flops: int,
    ) -> None:
        """Record one finished optimizer step; steps come in order, singly or a group after another.

        Args:
            step: number of optimizer steps finished.
            epoch: passes over the training set finished, a fraction.
            loss: mean over the `images` of the global batch.
            lr: learning rate of the convolution kernels.
            grad_norm: norm of the gradient of all weights.
            correct: images of the batch classified right in training mode.
            flops: floating-point operations of the step, forward and backward.

        Raises:
            ValueError: `step` does not follow the step before.
        """
        if step != self.last_step + 1:
            raise ValueError(f"step {step} was recorded after step {self.last_step}")
        row = {
            "kind": "step",
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_second": images_per_second,
            "correct": correct,
            "images": images,
            "flops": flops,
        }
        self._append(row)
        self.last_step = step
        self._sums.add(row)
        if self._bar is not None:
            accuracy = f"{100 * self._sums.accuracy:.1f} %"
            text = f"loss {loss:.3f}, train acc {accuracy}, {images_per_second:.0f} images/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)

    def weights(self, *, step: int, digests: dict[str, str]) -> None:
        """Record digests of the weights after `step`, before its evaluation; a second time is not recorded.

        Args:
            digests: by tensor, in the network's order, 16 hexadecimal digits of the SHA-256 of its bytes.

        Raises:
            ValueError: `step` is not the last step recorded.
        """
        if step != self.last_step:
            raise ValueError(f"digests after step {step} came when step {self.last_step} was the last")
        if self._last_digests != step:
            self._append({"kind": "weights", "step": step, "digests": digests})
            self._last_digests = step

    def eval(
        self,
        *,
        step: int,
        epoch: float,
        test_loss: float,
        test_accuracy: float,
        coefficients: list[list[list[float]]],
        **others: float,
    ) -> Row:
        """Record an evaluation after `step` and return its line.

        Train loss and accuracy are those of the steps since the evaluation before, as they were while
        training. A second evaluation after the same step (a run resumed right behind an evaluation)
        is not recorded; the line that is there is returned.

        Raises:
            ValueError: `step` is not the last step recorded.
        """
        if step != self.last_step:
            raise ValueError(f"an evaluation after step {step} came when step {self.last_step} was the last")
        if self.evals and self.evals[-1]["step"] == step:
            return self.evals[-1]
        metrics = {
            "train_loss": self._sums.loss,
            "train_accuracy": self._sums.accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            **others,
            "coefficients": coefficients,
        }
        row: Row = finite({"kind": "eval", "step": step, "epoch": epoch, **metrics})
        self._append(row)
        self.evals.append(row)
        if not self._quiet:
            self._table_row(epoch, metrics)
        self._sums = _Sums()
        return row

    def evaluation(self, details: Row) -> None:
        """Write `evaluation.json`. What cannot be written costs a line on stderr, not the run."""
        try:
            write_evaluation(self._dir, details)
        except OSError as error:
            self._tell(
                f"{self._dir / EVALUATION} cannot be written ({error.strerror}); "
                f"later: dist-train evaluate {self._dir} --write"
            )

    def checkpoint(self, path: Path, last: bool = False) -> None:
        """Hand a checkpoint that is whole to W&B, if the configuration says so. last: of a run that is done."""
        if self._wandb is not None and self._artifacts == ("last" if last else "all"):
            self._wandb.artifact(path)

    def say(self, phase: str) -> None:
        """Show on the progress bar what goes on while no steps are made."""
        if self._bar is not None:
            self._bar.set_postfix_str(phase)

    def end_progress(self) -> None:
        """Take the progress bar away: no more steps are to come."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def flush(self) -> None:
        """Bring every line to the disk; call it, in any thread, before a checkpoint is written.

        Raises:
            OSError: the disk did not take them all: a checkpoint after them could not be resumed.
        """
        with self._flushing:
            with self._lock:
                failure = self._write()
                end = self._synced + self._written
            if failure is None:
                try:
                    os.fsync(self._file.fileno())  # takes its time, in which other threads may append
                except OSError as error:
                    failure = error
                    with self._lock:
                        self._written = 0  # whatever was lost is written once more
            if failure is not None:
                raise OSError(failure.errno, failure.strerror, str(self._path)) from failure
            with self._lock:
                done = end - self._synced
                del self._lines[:done]
                self._synced, self._written = end, self._written - done

    def finish(self, summary: Row, draw: Callable[..., list[Path]]) -> None:
        """Write `summary.json` (with the data set's name added) and the plots, and hand both to W&B.

        draw: `plots.draw`, or another with its arguments.

        Plots that fail cost a line on stderr, not the run: they can be drawn again from the record.

        Raises:
            OSError: lines of the record or `summary.json` could not be written.
        """
        self.flush()
        summary = finite({"dataset": self._dataset, **summary})
        write_atomic(self._dir / SUMMARY, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
        try:
            pictures = draw(self._dir, dataset=self._dataset, name=self._name)
        except Exception as error:
            self._tell(f"plots not drawn ({error}); try again: dist-train plots {self._dir}")
            pictures = []
        if self._wandb is not None:
            self._wandb.summarize(summary, pictures, self._dir / EVALUATION)

    def close(self, exit_code: int) -> None:
        """End the record, in a `finally`: waits for W&B for a bounded time. A second call does nothing."""
        if not self._file.closed:
            with self._lock:
                self._write()
        self.end_progress()
        if self._wandb is not None:
            self._wandb.close(exit_code)
            self._wandb = None
        self._file.close()

    def _restore(self, resume_step: int) -> None:
        """Cut the file back to `resume_step` and take up the sums and evaluations of what is kept."""
        remedy = "put back the file that belongs to the checkpoint, or start in a new run folder"
        data = self._path.read_bytes() if self._path.exists() else b""
        keep = 0
        for row, end in _rows(data):
            if row["step"] > resume_step:
                break
            if row["kind"] == "eval":
                self.evals.append(row)
                self._sums = _Sums()
            elif row["kind"] == "weights":
                self._last_digests = row["step"]
            elif row["step"] != self.last_step + 1:
                raise UserError(f"{self._path} goes from step {self.last_step} to step {row['step']}; {remedy}")
            else:
                self.last_step = row["step"]
                self._sums.add(row)
            keep = end
        if self.last_step != resume_step:
            raise UserError(
                f"{self._path} has whole lines up to step {self.last_step}, but the checkpoint to go on "
                f"from is at step {resume_step}; {remedy}"
            )
        if keep != len(data):
            write_atomic(self._path, data[:keep])

    def _append(self, row: Row) -> None:
        line = (json.dumps(finite(row), allow_nan=False) + "\n").encode()
        with self._lock:
            self._lines += line
            self._write()

    def _write(self) -> OSError | None:
        """Write the lines that are not in the file yet, with the lock held; what fails is left for the next call."""
        file, failure = self._file.fileno(), None
        try:
            while self._written < len(self._lines):  # a write to a disk that fills up may be a partial one
                self._written += os.pwrite(file, self._lines[self._written :], self._synced + self._written)
        except OSError as error:
            failure = error
            self._written = self._lines.rfind(b"\n", 0, self._written) + 1
            with contextlib.suppress(OSError):  # a torn line that stays is later written over by the whole one
                os.ftruncate(file, self._synced + self._written)
        if failure is not None and not self._stuck:
            self._tell(
                f"{self._path} cannot be written ({failure.strerror}); free space on its disk: training goes on and "
                f"keeps the lines in memory, but no checkpoint can be written until then"
            )
        elif failure is None and self._stuck:
            self._tell(f"{self._path} can be written again; none of its lines is missing")
        self._stuck = failure is not None
        return failure

    def _table_row(self, epoch: float, metrics: Row) -> None:
        lines = []
        if self._header_due:
            lines.append("epoch  train loss  train acc  test loss  test acc  images/s  elapsed s")
            self._header_due = False
        lines.append(
            f"{epoch:5g}  {metrics['train_loss']:10.4f}  {100 * metrics['train_accuracy']:7.2f} %"
            f"  {metrics['test_loss']:9.4f}  {100 * metrics['test_accuracy']:6.2f} %"
            f"  {self._sums.rate:8.0f}  {time.monotonic() - self._start:9.1f}"
        )
        self._print("\n".join(lines), sys.stdout)

    def _tell(self, sentence: str) -> None:
        self._print(sentence, sys.stderr)

    def _print(self, text: str, stream: Any) -> None:
        if (bar := self._bar) is not None:
            bar.write(text, file=stream)  # takes the bar away for the time of the line
        else:
            print(text, file=stream, flush=True)


class _Sums:
    """Sums over the step lines since the last evaluation."""

    def __init__(self) -> None:
        self._images = self._correct = 0
        self._loss = self._seconds = 0.0

    def add(self, row: Row) -> None:
        images, loss, rate = row["images"], row["loss"], row["images_per_second"]
        self._images += images
        self._correct += row["correct"]
        # What was not finite is null in a line read back, and must come to the same sum.
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
    """The step lines and the eval lines of a `metrics.jsonl`, without a torn last line.

    Lines with digests are left to `read_digests`.

    Raises:
        ValueError: a line before the last is not one of a record.
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
        raise ValueError(f"line {line} of {path.name} is not a line of a training record")
    return rows["step"], rows["eval"]


def read_digests(path: Path) -> dict[int, dict[str, str]]:
    """The digests of a `metrics.jsonl`: by step, by tensor in the network's order. Raises OSError."""
    return {row["step"]: row["digests"] for row, _ in _rows(path.read_bytes()) if row["kind"] == "weights"}


def best_eval(evals: list[Row]) -> Row | None:
    """The eval line of the highest test accuracy, the earliest of several; None without any.

    For looking only: it is chosen on the test set. The result of a run is its last line.
    """
    scored = [row for row in evals if row["test_accuracy"] is not None]
    return max(scored, key=lambda row: row["test_accuracy"], default=None)


def write_evaluation(run_dir: Path, details: Row) -> None:
    """Write `evaluation.json`. Raises OSError."""
    write_atomic(run_dir / EVALUATION, (json.dumps(finite(details)) + "\n").encode())


def _rows(data: bytes) -> Iterator[tuple[Row, int]]:
    """Each line's object and the offset behind the line, up to the first that is torn or no record line."""
    start = 0
    while (end := data.find(b"\n", start) + 1) > 0:
        try:
            row = json.loads(data[start:end])
        except ValueError:
            return
        if not isinstance(row, dict) or row.get("kind") not in KINDS or type(row.get("step")) is not int:
            return
        yield row, end
        start = end


def finite(value: Any) -> Any:
    """`value` with None for every float that JSON does not have."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # float(): a numpy scalar becomes a plain one
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
