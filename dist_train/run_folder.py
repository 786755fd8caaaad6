"""The folder of a run: one job's alone, opened at its newest whole checkpoint, and kept by rank 0."""

from __future__ import annotations

import dataclasses
import platform
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dist_train import checkpoint, config, plots
from dist_train.data_prep import Manifest
from dist_train.distributed import Ranks
from dist_train.environment import Environment, changes, environment, git_commit, versions
from dist_train.errors import UserError, say
from dist_train.files import claimed, remove_partial, write_atomic
from dist_train.record import Recorder, append_history

_CLAIM = 5.0  # seconds to wait for the ranks of a run that was just stopped to leave its folder


def open_folder(run_dir: Path, settings: config.Config, held: ExitStack) -> Path | None:
    """Make or check a run folder, and claim it until `held` is closed. Returns its newest whole checkpoint, None
    without one. Raises UserError when it is in use, another run's, or cannot be written."""
    path = run_dir / "config.toml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(claimed(run_dir, _CLAIM))
        config.check_folder(run_dir, settings)
        remove_partial(run_dir)
        write_atomic(path, config.to_toml(settings).encode())
        checkpoint.clean(run_dir / "checkpoints")
    except BlockingIOError as error:
        raise UserError(
            f"--run-dir {run_dir} is in use by {error}; wait for it, stop it, or name another folder"
        ) from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another folder") from None
    return checkpoint.newest(run_dir / "checkpoints")


def check_data(state: dict[str, Any], data: Manifest, run_dir: Path) -> None:
    """Raises UserError when a checkpoint's run was trained on other pixels or labels."""
    known = state.get("data")  # checkpoints of earlier versions have none
    if known and known["content_sha256"] != _content(data):
        raise UserError(
            f"--run-dir {run_dir} belongs to a run on other images of {data.dataset}, whose betons were written anew "
            f"since; start in another folder, or put the old ones back"
        )


def _content(data: Manifest) -> dict[str, str]:
    return {name: split.content_sha256 for name, split in data.splits.items()}


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
                    "content_sha256": _content(data),
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
