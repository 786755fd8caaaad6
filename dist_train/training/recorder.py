"""The outputs of a run on rank 0: metrics.jsonl, the terminal, W&B, and at the end summary and plots."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_train.config.settings import RecordConfig
from dist_train.errors import reason
from dist_train.files import write_atomic
from dist_train.reports import plots
from dist_train.runs.layout import EVALUATION, SUMMARY
from dist_train.runs.metrics import MetricsFile, Row, finite, write_evaluation
from dist_train.tracking.client import WandbRun
from dist_train.tracking.messages import begin
from dist_train.training.progress import Progress


class Recorder:
    """Writes the metrics of one run. `metrics.jsonl` is written first. W&B runs in a separate process that reads the
    file; training waits for it only in `close`, for a bounded time."""

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
        """Open `metrics.jsonl`, truncated to `resume_step` where a checkpoint is resumed, and start W&B.

        Args:
            run_dir: the run folder; created if it is missing.
            config: where the metrics go, and what the terminal shows.
            dataset: the data set's name, for plot titles and `summary.json`.
            run_config: what W&B shows as the run's config: all settings, the data set's manifest and versions.
            total_steps: optimizer steps of the whole run.
            resume_step: steps finished at the checkpoint, 0 for a new run.
            matrix_rate: FLOP/s of matrix products on all ranks together, for W&B's MFU.
            branches: for each block the names of its convolutions, for W&B's mixing coefficients.

        Raises:
            UserError: the lines up to `resume_step` are not all there.
            OSError: the run folder cannot be written.
        """
        self._dir, self._dataset, self._artifacts = run_dir, dataset, config.artifacts
        self._name = config.name or run_dir.resolve().name
        self._progress = Progress(total_steps, resume_step, config.quiet)
        self._metrics = MetricsFile(run_dir, resume_step, self._progress.warn)
        self._wandb: WandbRun | None = None
        if config.wandb != "disabled":
            offset = self._metrics.synced
            self._wandb = WandbRun.start(
                begin(run_dir, config, config=run_config, branches=branches, offset=offset, matrix_rate=matrix_rate)
            )

    @property
    def last_step(self) -> int:
        """The newest step in `metrics.jsonl`, 0 for none."""
        return self._metrics.last_step

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
        """Write one finished optimizer step; steps come in order, one by one.

        Args:
            step: number of optimizer steps finished.
            epoch: finished passes over the training set, a fraction.
            loss: mean over the `images` of the global batch.
            lr: learning rate of the convolution kernels.
            grad_norm: norm of the gradient of all weights.
            images_per_second: mean rate since the last exchange between the ranks.
            correct: images of the batch classified correctly in training mode.
            images: images of the global batch.
            flops: floating-point operations of the step, forward and backward.

        Raises:
            ValueError: `step` does not follow the step before.
        """
        row = {
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
        self._metrics.step(row)
        self._progress.step(self._metrics.averages, loss, images_per_second)

    def weights(self, *, step: int, digests: dict[str, str]) -> None:
        """Write digests of the weights after `step`: see `MetricsFile.weights`. Raises ValueError."""
        self._metrics.weights(step, digests)

    def eval(
        self,
        *,
        step: int,
        epoch: float,
        test_loss: float,
        test_accuracy: float,
        coefficients: list[list[list[float]]],
        **more_metrics: float,
    ) -> None:
        """Write an evaluation after `step`; a second one after the same step is dropped. Raises ValueError where
        `step` is not the newest step in `metrics.jsonl`.

        Args:
            test_loss: mean cross entropy.
            test_accuracy: a fraction.
            coefficients: for each block and branch the mean and standard deviation of its mixing coefficient.
            more_metrics: such as `val_loss` and `test_accuracy_tta`.
        """
        rate = self._metrics.averages.rate
        row = {
            "step": step,
            "epoch": epoch,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            **more_metrics,
            "coefficients": coefficients,
        }
        if (line := self._metrics.evaluation(row)) is not None:
            self._progress.evaluation(line, rate)

    def evaluation(self, details: Callable[[], Row] | None) -> None:
        """Write `evaluation.json`. details: computes its content; None where a run is resumed after its last
        evaluation, whose details are in the file unless the computer failed before. A failure is reported on stderr,
        and the run continues."""
        path = self._dir / EVALUATION
        try:
            if details is not None:
                write_evaluation(self._dir, details())
            elif not path.exists():
                raise FileNotFoundError("the run was interrupted before")
        except Exception as error:  # such as too little memory
            self._progress.warn(
                f"{path} cannot be written ({reason(error)}); "
                f"later: {shlex.join(['dist-train', 'evaluate', str(self._dir), '--write'])}"
            )

    def checkpoint(self, path: Path, last: bool = False) -> None:
        """Pass a complete checkpoint to W&B if `record.artifacts` asks for it. last: whether the run is done."""
        if self._wandb is not None and self._artifacts == ("last" if last else "all"):
            self._wandb.artifact(path)

    def phase(self, name: str) -> None:
        """Show on the progress bar what runs between two steps, such as an evaluation."""
        self._progress.phase(name)

    def end_progress(self) -> None:
        """Remove the progress bar: no more steps follow."""
        self._progress.close()

    def flush(self) -> None:
        """Sync every line of `metrics.jsonl` to disk: see `MetricsFile.flush`. Raises OSError."""
        self._metrics.flush()

    def finish(self, summary: Row) -> None:
        """Write `summary.json` (with the data set's name added) and the plots, and pass both to W&B.

        A failure of the plots is only reported on stderr: they can be drawn again from the metrics.

        Raises:
            OSError: `summary.json` or lines of `metrics.jsonl` could not be written.
        """
        self.flush()
        summary = finite({"dataset": self._dataset, **summary})
        write_atomic(self._dir / SUMMARY, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
        try:
            images = plots.draw(self._dir, dataset=self._dataset, name=self._name)
        except Exception as error:
            again = shlex.join(["dist-train", "plots", str(self._dir)])
            self._progress.warn(f"plots not drawn ({error}); try again: {again}")
            images = []
        if self._wandb is not None:
            self._wandb.summarize(summary, images, self._dir / EVALUATION)

    def close(self, exit_code: int) -> None:
        """Close all outputs, and wait for W&B for a bounded time. A second call does nothing."""
        self._metrics.close()
        self.end_progress()
        if self._wandb is not None:
            self._wandb.close(exit_code)
            self._wandb = None
