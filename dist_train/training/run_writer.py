"""What rank 0 writes of a run: metrics, checkpoints, history, summary. The other ranks write nothing."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dist_train import config
from dist_train.data.batches import Data
from dist_train.data_prep import Manifest
from dist_train.distributed.ranks import Ranks
from dist_train.errors import FAILED, outcome_of, reason, say
from dist_train.model.network import BlockNetwork, tensor_digests
from dist_train.runs import checkpoint
from dist_train.runs.checkpoint import Checkpoint, DataDescription
from dist_train.runs.environment import Environment, changes, git_commit, merged, mixture, versions
from dist_train.runs.history import append_history
from dist_train.runs.layout import checkpoint_folder
from dist_train.training.evaluation import Evaluation
from dist_train.training.recorder import Recorder


class Writer:
    """The interface through which the training loop writes; this class, used on ranks above 0, writes nothing."""

    def step(self, **metrics: Any) -> None:
        """Write the metrics of one step: see `Recorder.step`."""

    def weights(self, step: int, model: BlockNetwork) -> None:
        """Write digests of the weights after `step`."""

    def phase(self, name: str) -> None:
        """Show what runs between two steps, such as an evaluation."""

    def evaluation(
        self, step: int, epoch: float, evaluations: dict[str, Evaluation], data: Data, last: bool = False
    ) -> None:
        """Write the evaluations after `step`. evaluations: by the prefix of their metrics, such as `test`. last:
        whether it is the last of the run, whose details `RunWriter.finish` writes to `evaluation.json`."""

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint of the state after `step`; its tensors may change after the call."""


class RunWriter(Writer):
    """Writes the run folder, on rank 0."""

    def __init__(
        self,
        run_dir: Path,
        settings: config.Config,
        ranks: Ranks,
        data: Manifest,
        total_steps: int,
        matrix_rate: float,
        resumed: Checkpoint | None,
        everyone: Sequence[tuple[Environment, dict[str, str | int]]],
    ) -> None:
        """matrix_rate: FLOP/s of matrix products on all ranks together. everyone: by rank its environment and its
        machine; ranks that differ in the former are reported on stderr. resumed: the checkpoint that the run resumes
        from, None for a new run; a change of the environment since that checkpoint is reported on stderr.
        Raises UserError and OSError as Recorder does."""
        self.run_dir, self._artifacts = run_dir, settings.record.artifacts
        step = resumed.step if resumed else 0
        self.environments = self._environments(data, step, resumed.environments if resumed else [], everyone)
        self._recorder = Recorder(
            run_dir,
            settings.record,
            dataset=data.dataset,
            run_config={
                **config.to_dict(settings),
                "manifest": dataclasses.asdict(data),
                "code": {"git_commit": git_commit(), "versions": versions()},
            },
            total_steps=total_steps,
            resume_step=step,
            matrix_rate=matrix_rate,
            branches=[[conv.name for conv in block.convolutions] for block in settings.model.blocks],
        )
        self._checkpoints = checkpoint.Writer(
            checkpoint_folder(run_dir),
            settings.checkpoint.keep,
            {
                "environments": self.environments,
                # configuration and data set, so that inference needs nothing but the checkpoint
                "config": config.to_toml(settings),
                "data": DataDescription.of(data).to_dict(),
            },
            before=self._recorder.flush,  # resuming needs the metrics up to the checkpoint's step
            written=self._recorder.checkpoint,
            failed=self._not_written,
        )
        self._details: Callable[[], dict[str, Any]] | None = None
        if ranks.heartbeat:  # it ends the process where another rank is lost
            ranks.heartbeat.before_exit = partial(self._end, FAILED)

    def step(self, **metrics: Any) -> None:
        self._recorder.step(**metrics)

    def weights(self, step: int, model: BlockNetwork) -> None:
        self._recorder.weights(step=step, digests=tensor_digests(model))

    def phase(self, name: str) -> None:
        self._recorder.phase(name)

    def evaluation(
        self, step: int, epoch: float, evaluations: dict[str, Evaluation], data: Data, last: bool = False
    ) -> None:
        metrics = {f"{name}_{key}": value for name, e in evaluations.items() for key, value in e.metrics.items()}
        test = evaluations["test"]
        self._recorder.eval(step=step, epoch=epoch, coefficients=test.coefficients(), **metrics)
        if last:  # computed by `finish`: they may take more memory than there is, and the checkpoint comes first
            self._details = partial(test.details, data, step)

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        self._checkpoints.write(step, state)

    def wait(self) -> str:
        """Wait until the last checkpoint is written. Returns "", or what could not be written, and why."""
        self._recorder.end_progress()
        error = self._checkpoints.wait()
        return f"the checkpoint of step {self._recorder.last_step} ({reason(error)})" if error else ""

    def finish(self, summary: dict[str, Any]) -> str:
        """Write the details of the last evaluation, the summary and the plots of a run that is done. Returns "", or
        what could not be written, and why."""
        self._recorder.evaluation(self._details)
        try:
            self._recorder.finish({**summary, "environments": self.environments})
        except OSError as error:
            return f"summary.json ({reason(error)})"
        if self._artifacts == "last" and (last := checkpoint.newest(checkpoint_folder(self.run_dir))):
            self._recorder.checkpoint(last, last=True)
        return ""

    def close(self, code: int, why: str) -> None:
        """Wait for the last checkpoint, write to the history how the run ended, and close its outputs. code: the exit
        code. why: the reason in words."""
        self._end(code, why)
        self._recorder.close(code)

    def _end(self, code: int, why: str) -> None:
        self._checkpoints.wait()
        append_history(self.run_dir, "end", outcome=outcome_of(code), step=self._recorder.last_step, reason=why)

    def _environments(
        self,
        data: Manifest,
        step: int,
        known: list[Environment],
        everyone: Sequence[tuple[Environment, dict[str, str | int]]],
    ) -> list[Environment]:
        """All environments of the run, the current one last. Also writes the history's line of the start."""
        each = [environment for environment, _ in everyone]
        now = merged(each)
        if differences := mixture(each):
            say(f"the ranks differ in {differences}: the weights may differ in bits from those of ranks that are alike")
        changed = changes(known[-1], now) if known else {}
        if changed:
            parts = ", ".join(f"{name} ({before} before, {after} now)" for name, (before, after) in changed.items())
            say(f"{self.run_dir} resumes with another {parts}: its weights may differ in bits from an unbroken run's")
        append_history(
            self.run_dir,
            "start",
            step=step,
            world_size=len(everyone),
            host=platform.node(),
            environment=now,
            ranks=[{**machine, **environment} for environment, machine in everyone],
            images={name: split.content_sha256 for name, split in data.splits.items()},
            **({"changed": changed} if changed else {}),
        )
        return [*known, now] if changed or not known else known

    def _not_written(self, step: int, error: Exception) -> None:
        kept = checkpoint.steps(checkpoint_folder(self.run_dir))
        last = f"the one of step {kept[-1]} is kept" if kept else "there is none yet"
        say(f"the checkpoint of step {step} could not be written ({reason(error)}); {last}")
        append_history(self.run_dir, "checkpoint_failed", step=step, reason=reason(error))
