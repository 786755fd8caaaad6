"""The metrics of the steps: left on the device, then gathered over the ranks, checked, and written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from dist_train.config.settings import TrainConfig
from dist_train.data.batches import Data
from dist_train.distributed.ranks import Ranks, gather_shares
from dist_train.errors import DivergedError
from dist_train.training.run_writer import Writer


@dataclass(frozen=True)
class StepMetrics:
    """What one step leaves behind on this rank, its tensors on the device.

    parts: (microbatches of this rank, 3) float64: summed loss, correct count, largest magnitude in the gradient. norm:
    of the whole gradient, float32. lr: of the kernels. flops: of the whole global batch, forward and backward.
    """

    parts: Tensor
    norm: Tensor
    lr: float
    flops: int


class StepLog:
    """Collects the metrics of the steps, and agrees with all ranks on what they say."""

    def __init__(self, settings: TrainConfig, data: Data, ranks: Ranks, writer: Writer) -> None:
        self.batch_size, self.microbatches = settings.batch_size, settings.microbatches
        self.scaled = settings.precision == "fp16"
        self.data, self.ranks, self.writer = data, ranks, writer
        self.steps: list[StepMetrics] = []
        self.clock = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        """Keep the metrics of the next step until the next exchange. Waits for nothing."""
        self.steps.append(metrics)

    def exchange(self, step: int, stop: int) -> str:
        """Gather the metrics of the steps up to `step`, check and write them, and agree whether to stop.

        stop: number of the stop signal that this rank received, or 0. Returns which signal came to which rank, ""
        for none: the same on all ranks. Raises DivergedError.
        """
        count = len(self.steps)
        mine = torch.stack([metrics.parts for metrics in self.steps]).transpose(0, 1)  # microbatch first
        asked = mine.new_full((*mine.shape[:2], 1), 1000 * self.ranks.rank + stop if stop else 0)
        with self.ranks.exchange():  # the stop request travels with the losses: agreement costs no message
            parts = gather_shares(self.ranks, torch.cat((mine, asked), 2), self.microbatches).transpose(0, 1).tolist()
        elapsed = time.perf_counter() - self.clock
        first = step - count + 1
        norms = torch.stack([metrics.norm for metrics in self.steps]).tolist()
        for number, metrics, norm, of_step in zip(range(first, step + 1), self.steps, norms, parts, strict=True):
            self._check(number, of_step, first - 1)
            self.writer.step(
                step=number,
                epoch=number / self.data.steps_per_epoch,
                loss=sum(part[0] for part in of_step) / self.batch_size,  # in the order of the slots
                lr=metrics.lr,
                grad_norm=norm,
                images_per_second=self.batch_size * count / elapsed,
                correct=int(sum(part[1] for part in of_step)),
                images=self.batch_size,
                flops=metrics.flops,
            )
        self.steps.clear()
        self.clock = time.perf_counter()
        by = int(max(part[3] for part in parts[-1]))
        return f"{Signals(by % 1000).name} on rank {by // 1000}" if by else ""

    def restart_clock(self) -> None:
        """Do not count the time since the last exchange, spent on evaluations and checkpoints, as training."""
        self.clock = time.perf_counter()

    def _check(self, step: int, parts: list[list[float]], saved: int) -> None:
        """Raises DivergedError. parts: (loss, correct, largest gradient, ...) of each microbatch. saved: the last step
        whose checkpoint can be there."""
        # a gradient scaler expects fp16 gradients that overflow, and skips the step
        bad: list[dict[str, Any]] = [
            {"microbatch": slot, "loss": str(loss), "largest_gradient": str(largest)}
            for slot, (loss, _, largest, *_) in enumerate(parts)
            if not math.isfinite(loss) or not (self.scaled or math.isfinite(largest))
        ]
        if not bad:
            return
        for microbatch in bad:
            microbatch["images"] = self.data.sample_indices(step - 1, microbatch["microbatch"])
        worst = bad[0]
        images = ", ".join(map(str, worst["images"][:5])) + ", ..." * (len(worst["images"]) > 5)
        raise DivergedError(
            f"at step {step} the loss is {worst['loss']} and the largest gradient {worst['largest_gradient']} in "
            f"microbatch {worst['microbatch']} (training images {images}; all in diverged.json); the checkpoints up "
            f"to step {saved} are intact, and the same command resumes from the newest of them; to change its course "
            f"lower the learning rates in [optim] or use train.precision=fp32, with a new --run-dir",
            {"step": step, "microbatches": bad},
        )
