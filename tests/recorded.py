"""Run folders with invented metrics, written by the trainer's Recorder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from dist_train.config.settings import RecordConfig
from dist_train.runs.metrics import Row
from dist_train.training.recorder import Recorder

EPOCH = 4  # steps
OFF = RecordConfig(wandb="disabled", quiet=True)
BRANCHES = [["3x3", "3x3 d2 s2"], ["5x5"]]  # names of the convolutions of two blocks
MATRIX_RATE = 4e6  # FLOP/s


def opened(run_dir: Path, config: RecordConfig = OFF, resume_step: int = 0, run_config: Row | None = None) -> Recorder:
    return Recorder(
        run_dir,
        config,
        dataset="digits",
        run_config=run_config or {"optim": {"lr": 0.5}},
        total_steps=3 * EPOCH,
        resume_step=resume_step,
        matrix_rate=MATRIX_RATE,
        branches=BRANCHES,
    )


def loss_at(step: int) -> float:
    return 3.0 / (step + 0.1)


def digests_at(step: int) -> dict[str, str]:
    return {"stem.weight": f"{step:016x}", "output.bias": f"{7 * step:016x}"}


def mixed_at(step: int) -> list[list[list[float]]]:
    """Mean and standard deviation of each coefficient of two blocks, with two convolutions and with one."""
    return [[[0.5, 0.25], [1.0 / step, 0.125]], [[float(step), 0.0]]]


def train(recorder: Recorder, first: int, last: int, loss: Callable[[int], float] = loss_at) -> None:
    """Write steps `first` to `last`, with digests and an evaluation after each epoch."""
    for step in range(first, last + 1):
        recorder.step(
            step=step,
            epoch=step / EPOCH,
            loss=loss(step),
            lr=0.1 * step,
            grad_norm=2.0 / step,
            flops=320 * step,
            images_per_second=1000.0 + step,
            correct=7 * step % 32,
            images=32,
        )
        if step % EPOCH == 0:
            recorder.weights(step=step, digests=digests_at(step))
            recorder.eval(
                step=step,
                epoch=step // EPOCH,
                test_loss=1 / step,
                test_accuracy=min(step / 20, 1.0),
                coefficients=mixed_at(step),
            )


def whole_run(run_dir: Path, config: RecordConfig = OFF) -> Row:
    """Write a run of three epochs from start to end. Returns the seconds that its steps and its close took."""
    begin = time.monotonic()
    recorder = opened(run_dir, config)
    train(recorder, 1, 3 * EPOCH)
    seconds = {"training": time.monotonic() - begin}
    recorder.finish({"test_accuracy": 0.6, "ratio": math.inf})
    begin = time.monotonic()
    recorder.close(0)
    return {**seconds, "closing": time.monotonic() - begin}
