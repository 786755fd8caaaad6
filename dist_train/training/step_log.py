"""The metrics of the steps: kept on the device, then gathered over the ranks, checked and written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from dist_train.config.settings import TrainConfig
from dist_train.data.batches import Data
from dist_train.distributed.ranks import Ranks, gather_shares
from dist_train.errors import DivergedError, NotFiniteError
from dist_train.training.run_writer import Writer


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step on this rank, tensors on the device.

    parts: (microbatches of this rank, 3) float64: summed loss, correct images, largest magnitude in the gradient.
    norm: of the whole gradient, a float32 scalar. lr: learning rate of the kernels. images: that all ranks trained on.
    flops: floating-point operations for the global batch, of choosing these images, forward and backward.
    """

    parts: Tensor
    norm: Tensor
    lr: float
    images: int
    flops: int


class StepLog:
    """Collects the metrics of the steps, and exchanges them and stop requests between the ranks."""

    def __init__(self, settings: TrainConfig, data: Data, ranks: Ranks, writer: Writer, step: int) -> None:
        """step: finished steps."""
        self.microbatches = settings.microbatches
        self.scaled = settings.precision == "fp16"
        self.data, self.ranks, self.writer = data, ranks, writer
        self.steps: list[StepMetrics] = []
        self.clock = time.perf_counter()
        self.finite_until = step  # the last step after which weights and results were known to be finite

    def add(self, metrics: StepMetrics) -> None:
        """Keep the metrics of the next step until the next exchange. Does not wait for the device."""
        self.steps.append(metrics)

    def exchange(self, step: int, stop: int) -> str:
        """Gather the metrics of the steps up to `step`, check and write them, and agree whether to stop.

        stop: number of the stop signal that this rank received, or 0. Returns the signal and the rank that received
        it, "" for none; the same on all ranks. Raises DivergedError when a loss or a gradient is not finite.
        """
        count = len(self.steps)
        own = torch.stack([metrics.parts for metrics in self.steps]).transpose(0, 1)  # microbatch first
        request = own.new_full((*own.shape[:2], 1), 1000 * self.ranks.rank + stop if stop else 0)
        # the stop request travels with the losses: agreement costs no extra message
        parts = gather_shares(self.ranks, torch.cat((own, request), 2), self.microbatches).transpose(0, 1).tolist()
        elapsed = time.perf_counter() - self.clock
        first, images = step - count + 1, sum(metrics.images for metrics in self.steps)
        norms = torch.stack([metrics.norm for metrics in self.steps]).tolist()
        for number, metrics, norm, of_step in zip(range(first, step + 1), self.steps, norms, parts, strict=True):
            self._check(number, of_step, first - 1)
            self.writer.step(
                step=number,
                epoch=number / self.data.steps_per_epoch,
                loss=sum(part[0] for part in of_step) / metrics.images,  # in the order of the slots
                lr=metrics.lr,
                grad_norm=norm,
                images_per_second=images / elapsed,
                correct=int(sum(part[1] for part in of_step)),
                images=metrics.images,
                flops=metrics.flops,
            )
        self.steps.clear()
        self.clock = time.perf_counter()
        received = int(max(part[3] for part in parts[-1]))
        return f"{Signals(received % 1000).name} on rank {received // 1000}" if received else ""

    @contextmanager
    def finite(self, step: int) -> Iterator[None]:
        """A context in which a NotFiniteError becomes the DivergedError of the network after `step`, before it is
        saved."""
        try:
            yield
        except NotFiniteError as error:
            since = f", as they were after step {self.finite_until}" if self.finite_until else ""
            raise DivergedError(
                f"after step {step} {error}{since}; {_remedy(step - 1)}", {"step": step, "microbatches": []}
            ) from None
        self.finite_until = step

    def restart_clock(self) -> None:
        """Do not count the time since the last exchange, spent on evaluations and checkpoints, as training."""
        self.clock = time.perf_counter()

    def _check(self, step: int, parts: list[list[float]], saved: int) -> None:
        """Raises DivergedError when a loss or a gradient is not finite. parts: (loss, correct, largest gradient, ...)
        of each microbatch. saved: the last step that can have a checkpoint."""
        # fp16 gradients may overflow: the gradient scaler then skips the step
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
            f"microbatch {worst['microbatch']} (training images {images}; all in diverged.json); {_remedy(saved)}",
            {"step": step, "microbatches": bad},
        )


def _remedy(saved: int) -> str:
    """saved: the last step that can have a checkpoint."""
    return (
        f"no checkpoint of a later step than {saved} is written, and the same command resumes from the newest; to "
        f"change its course lower the learning rates in [optim] or use train.precision=fp32, with a new --run-dir"
    )
