"""What rank 0 keeps of a run: metrics, checkpoints, history, summary."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

from dist_train import config
from dist_train.data_prep import Manifest
from dist_train.distributed.ranks import Ranks
from dist_train.errors import say
from dist_train.reports import plots
from dist_train.runs import checkpoint
from dist_train.runs.environment import Environment, changes, environment, git_commit, versions
from dist_train.runs.folder import content_sha256
from dist_train.runs.history import append_history
from dist_train.runs.metrics import Recorder


class Keeper:
    """What rank 0 keeps of a run: `recorder`, `writer` of checkpoints, and the history around them."""

    def __init__(
        self,
        run_dir: Path,
        settings: config.Config,
        ranks: Ranks,
        data: Manifest,
        total_steps: int,
        matrix_rate: float,
        state: dict[str, Any] | None,
    ) -> None:
        """matrix_rate: floating-point operations a second of matrix products on all ranks. state: of the checkpoint
        that the run goes on from, None for a new run. Says so, once, when the environment is another one than
        before."""
        self.run_dir, self._artifacts = run_dir, settings.record.artifacts
        step = state["step"] if state else 0
        self.environments = self._environments(ranks, step, state["environments"] if state else [])
        self.recorder = Recorder(
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
        self.writer = checkpoint.Writer(
            run_dir / "checkpoints",
            settings.checkpoint.keep,
            {
                "environments": self.environments,
                # with these a checkpoint is enough to use the network
                "config": config.to_toml(settings),
                "data": {
                    "dataset": data.dataset,
                    "classes": list(data.classes),
                    "image_shape": list(data.image_shape),
                    "mean": list(data.mean),
                    "std": list(data.std),
                    "content_sha256": content_sha256(data),
                },
            },
            before=self.recorder.flush,  # a checkpoint without the lines before it could not be resumed
            written=self.recorder.checkpoint,
            failed=self._not_written,
        )

    def last_checkpoint(self) -> str:
        """Wait until the last checkpoint is written. Returns "", or that it could not be, and why."""
        self.recorder.end_progress()
        error = self.writer.wait()
        return f"the checkpoint of step {self.recorder.last_step} ({error.strerror})" if error else ""

    def finish(self, summary: dict[str, Any]) -> str:
        """Write the summary and the plots of a run that is done. Returns "", or what could not be written, and why."""
        try:
            self.recorder.finish({**summary, "environments": self.environments}, plots.draw)
        except OSError as error:
            return f"summary.json ({error.strerror})"
        if self._artifacts == "last" and (last := checkpoint.newest(self.run_dir / "checkpoints")):
            self.recorder.checkpoint(last, last=True)
        return ""

    def close(self, code: int, reason: str) -> None:
        """Say in the history how the run ended, and close its record. code: the exit code."""
        outcome = {0: "done", 75: "preempted"}.get(code, "failed")
        append_history(self.run_dir, "end", outcome=outcome, step=self.recorder.last_step, reason=reason)
        self.recorder.close(code)

    def _environments(self, ranks: Ranks, step: int, known: list[Environment]) -> list[Environment]:
        """Those that the run has had, this one last."""
        now = environment(ranks.device)
        changed = changes(known[-1], now) if known else {}
        if changed:
            said = ", ".join(f"{name} ({before} before, {after} now)" for name, (before, after) in changed.items())
            say(f"{self.run_dir} goes on with another {said}: its weights may differ in bits from an unbroken run's")
        append_history(
            self.run_dir,
            "start",
            step=step,
            world_size=ranks.world_size,
            host=platform.node(),
            environment=now,
            **({"changed": changed} if changed else {}),
        )
        return [*known, now] if changed or not known else known

    def _not_written(self, step: int, error: OSError) -> None:
        kept = checkpoint.steps(self.run_dir / "checkpoints")
        last = f"the one of step {kept[-1]} stays" if kept else "there is none yet"
        say(f"the checkpoint of step {step} could not be written ({error.strerror}); {last}; training goes on")
        append_history(self.run_dir, "checkpoint_failed", step=step, reason=error.strerror)
