"""Losses and counts of the steps, gathered over the ranks, checked and recorded."""

from __future__ import annotations

import math
import time
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from dist_train.config.settings import TrainConfig
from dist_train.data.batches import Data
from dist_train.distributed.ranks import Ranks, gather_shares
from dist_train.errors import DivergedError
from dist_train.runs.metrics import Recorder


class StepLog:
    """Losses, correct counts and largest gradients of this rank's microbatches, left on the device until they are
    recorded."""

    def __init__(self, settings: TrainConfig, ranks: Ranks, data: Data, recorder: Recorder | None) -> None:
        self.batch_size, self.microbatches = settings.batch_size, settings.microbatches
        self.scaled = settings.precision == "fp16"
        self.ranks, self.data, self.recorder = ranks, data, recorder
        self.pending: list[Tensor] = []
        self.steps: list[tuple[float, Tensor, int]] = []
        self.clock = time.perf_counter()

    def add(self, loss: Tensor, correct: Tensor, largest: Tensor | None) -> None:
        """largest: the largest magnitude in the microbatch's gradient."""
        assert largest is not None
        self.pending.append(torch.stack((loss.detach().double(), correct.double(), largest.double())))

    def end_step(self, rate: float, norm: Tensor, flops: int) -> None:
        """norm: of the whole gradient. flops: of one image."""
        self.steps.append((rate, norm, flops))

    def flush(self, step: int, stop: int) -> str:
        """Record the pending steps, of which `step` is the last, and agree with all ranks whether to stop.

        stop: number of the stop signal that this rank received, or 0. Returns which one came to which rank, ""
        for none: the same on all ranks. Raises DivergedError.
        """
        count = len(self.steps)
        mine = torch.stack(self.pending).view(count, -1, 3).transpose(0, 1)  # microbatch first
        asked = mine.new_full((*mine.shape[:2], 1), 1000 * self.ranks.rank + stop if stop else 0)
        with self.ranks.exchange():  # the stop request travels with the losses: agreement costs no message
            sums = gather_shares(self.ranks, torch.cat((mine, asked), 2), self.microbatches).transpose(0, 1).tolist()
        elapsed = time.perf_counter() - self.clock
        first = step - count + 1
        norms = torch.stack([norm for _, norm, _ in self.steps]).tolist()
        for number, (rate, _, flops), norm, parts in zip(range(first, step + 1), self.steps, norms, sums, strict=True):
            self._check(number, parts, first - 1)
            if self.recorder is not None:
                self.recorder.step(
                    step=number,
                    epoch=number / self.data.steps_per_epoch,
                    loss=sum(part[0] for part in parts) / self.batch_size,  # in the order of the slots
                    lr=rate,
                    grad_norm=norm,
                    flops=self.batch_size * flops,
                    images_per_second=self.batch_size * count / elapsed,
                    correct=int(sum(part[1] for part in parts)),
                    images=self.batch_size,
                )
        self.pending.clear()
        self.steps.clear()
        self.clock = time.perf_counter()
        by = int(max(part[3] for part in sums[-1]))
        return f"{Signals(by % 1000).name} on rank {by // 1000}" if by else ""

    def restart_clock(self, paused: bool) -> None:
        """Leave the time of evaluations and checkpoints out of the images per second."""
        if paused:
            self.clock = time.perf_counter()

    def _check(self, step: int, parts: list[list[float]], saved: int) -> None:
        """parts: (loss, correct, largest gradient, ...) of each microbatch."""
        # a gradient scaler expects fp16 gradients that overflow, and skips the step
        bad: list[dict[str, Any]] = [
            {"microbatch": slot, "loss": str(loss), "largest_gradient": str(largest)}
            for slot, (loss, _, largest, *_) in enumerate(parts)
            if not math.isfinite(loss) or not (self.scaled or math.isfinite(largest))
        ]
        if not bad:
            return
        for found in bad:
            found["images"] = self.data.sample_indices(step - 1, found["microbatch"])
        worst = bad[0]
        images = ", ".join(map(str, worst["images"][:5])) + ", ..." * (len(worst["images"]) > 5)
        raise DivergedError(
            f"at step {step} the loss is {worst['loss']} and the largest gradient {worst['largest_gradient']} in "
            f"microbatch {worst['microbatch']} (training images {images}; all in diverged.json); the checkpoints up "
            f"to step {saved} are intact, and the same command goes on from the newest of them; to change its course "
            f"lower the learning rates in [optim] or use train.precision=fp32, with a new --run-dir",
            {"step": step, "microbatches": bad},
        )
