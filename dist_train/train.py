"""The training loop. Its only state is (weights, optimizer, BatchNorm rows, step)."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from dist_train import checkpoint
from dist_train.checkpoint import CheckpointConfig
from dist_train.data import Data
from dist_train.distributed import FixedOrderSum, Ranks, gather_rows, on_main
from dist_train.errors import DivergedError
from dist_train.evaluate import evaluate
from dist_train.model import BatchNorm, BlockNetwork, ModelConfig, whiten
from dist_train.optim import Optimizers
from dist_train.randomness import derive
from dist_train.record import Recorder

Positive = Annotated[int, Field(gt=0)]
_WHITENING_IMAGES = 5000


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class TrainConfig:
    """microbatches: the fixed parts of a global batch, spread over the ranks; any world size that is a power
    of two and divides it gives the same weights. threads: CPU threads of a rank; they are part of what the
    weights depend on. timeout: seconds until a collective operation that a rank does not join fails.
    log_every: steps whose losses are fetched from the device at once; 0 takes 1 on a CPU and 20 on a GPU."""

    epochs: Positive = 10
    batch_size: Positive = 2000
    microbatches: Positive = 8
    seed: int = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    compile: bool = False
    deterministic: bool = True
    threads: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: Positive = 600
    log_every: Annotated[int, Field(ge=0)] = 0


def build_model(architecture: ModelConfig, settings: TrainConfig, data: Data) -> BlockNetwork:
    """The network with its initial weights, a function of the seed and the data set, on the CPU."""
    height, width, channels = data.manifest.image_shape
    torch.manual_seed(derive(settings.seed, "init"))
    model = BlockNetwork(architecture, (channels, height, width), len(data.manifest.classes), settings.microbatches)
    if model.stem is not None and architecture.stem.kind == "whiten":
        whiten(model.stem, data.sample(_WHITENING_IMAGES))
    return model


def train(
    settings: TrainConfig,
    saving: CheckpointConfig,
    model: BlockNetwork,
    optimizers: Optimizers,
    data: Data,
    ranks: Ranks,
    run_dir: Path,
    start: Path | None,
    recorder: Recorder | None,
) -> None:
    """Train `model`, which is on the rank's device, from the checkpoint `start`, or from the first step without
    one, to the last epoch. After it the network is the same on every rank.

    recorder: on rank 0 only, opened at the step of `start`. Raises DivergedError when the loss is no longer
    finite.
    """
    steps_per_epoch, total_steps = data.steps_per_epoch, optimizers.total_steps
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision == "fp16")
    state = _State(model, optimizers, scaler)
    step = state.load(checkpoint.load(start)) if start else 0
    compiled: nn.Module = torch.compile(model, dynamic=False) if settings.compile else model  # type: ignore[assignment]
    gradients = FixedOrderSum(ranks, compiled, settings.microbatches)
    dtype = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    autocast = torch.autocast(ranks.device.type, dtype, enabled=settings.precision != "fp32")
    meter = _Meter(settings.batch_size, ranks, steps_per_epoch, recorder)
    log_every = settings.log_every or (20 if ranks.device.type == "cuda" else 1)
    slots = torch.arange(settings.microbatches, device=ranks.device)

    steps = data.steps(step)
    while step < total_steps:
        rate = optimizers.set_rates(step)
        for index, batch in enumerate(next(steps)):
            # dropout draws from torch's global generator
            torch.manual_seed(derive(settings.seed, "microbatch", step, batch.slot))
            with gradients.leaf(index):
                with autocast:
                    logits: Tensor = gradients.ddp(batch.images, slots[batch.slot, None])
                loss = F.cross_entropy(
                    logits.float(), batch.labels, reduction="sum", label_smoothing=settings.label_smoothing
                )
                scaler.scale(loss / settings.batch_size).backward()
            meter.add(loss, (logits.argmax(1) == batch.labels).sum())
        optimizers.step(scaler)
        step += 1
        meter.end_step(rate)

        epoch, within = divmod(step, steps_per_epoch)
        save = step == total_steps or saving.due(step, steps_per_epoch)
        if within == 0 or save or step % log_every == 0:
            meter.flush(step)  # stops the run before a loss that is not finite reaches a checkpoint
        if within == 0 or save:
            _gather_batch_norm(model, ranks)
        if within == 0:
            if recorder is not None:
                recorder.say("evaluating")
            found = evaluate(compiled, data, ranks, autocast)
            if recorder is not None:
                recorder.eval(step=step, epoch=epoch, **found)
        if save:
            on_main(ranks, partial(_save, saving, run_dir, state.dump(step), recorder))
        meter.restart_clock(within == 0 or save)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all weights and BatchNorm rows: equal exactly when they are."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@plain_dataclass(frozen=True)
class _State:
    """All that a run needs to go on, besides its configuration and the number of finished steps."""

    model: BlockNetwork
    optimizers: Optimizers
    scaler: torch.amp.GradScaler

    def dump(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> int:
        """Take up a dumped state and return its step."""
        self.model.load_state_dict(state["model"])
        self.optimizers.load(state["optimizers"])
        self.scaler.load_state_dict(state["scaler"])
        return int(state["step"])


def _save(saving: CheckpointConfig, run_dir: Path, state: dict[str, Any], recorder: Recorder | None) -> None:
    assert recorder is not None  # rank 0 has one
    recorder.flush()  # a checkpoint without the lines before it could not be resumed
    checkpoint.save(run_dir / "checkpoints", state["step"], state, saving.keep)


@torch.no_grad()
def _gather_batch_norm(model: BlockNetwork, ranks: Ranks) -> None:
    """Give every rank all rows of the BatchNorms, each from the rank that runs its microbatch."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            for rows in (module.rows_mean, module.rows_var):
                share = ranks.share(len(rows))
                rows.copy_(gather_rows(ranks, rows[share.start : share.stop]))


class _Meter:
    """Losses and correct counts of this rank's microbatches, left on the device until they are recorded."""

    def __init__(self, batch_size: int, ranks: Ranks, steps_per_epoch: int, recorder: Recorder | None) -> None:
        self.batch_size, self.ranks, self.recorder = batch_size, ranks, recorder
        self.steps_per_epoch = steps_per_epoch
        self.pending: list[Tensor] = []
        self.rates: list[float] = []
        self.clock = time.perf_counter()

    def add(self, loss: Tensor, correct: Tensor) -> None:
        self.pending.append(torch.stack((loss.detach().double(), correct.double())))

    def end_step(self, rate: float) -> None:
        self.rates.append(rate)

    def flush(self, step: int) -> None:
        """Record the pending steps, of which `step` is the last. Raises DivergedError."""
        count = len(self.rates)
        if count == 0:
            return
        mine = torch.stack(self.pending).view(count, -1, 2).transpose(0, 1)  # microbatch first
        sums = gather_rows(self.ranks, mine).transpose(0, 1).tolist()
        elapsed = time.perf_counter() - self.clock
        first = step - count + 1
        for number, (rate, parts) in enumerate(zip(self.rates, sums, strict=True), first):
            loss = sum(part[0] for part in parts) / self.batch_size  # in the order of the slots
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {number}; the checkpoints up to step {first - 1} are intact; "
                    f"lower the learning rates in [optim] or use train.precision=fp32, with a new --run-dir"
                )
            if self.recorder is not None:
                self.recorder.step(
                    step=number,
                    epoch=number / self.steps_per_epoch,
                    loss=loss,
                    lr=rate,
                    images_per_second=self.batch_size * count / elapsed,
                    correct=int(sum(part[1] for part in parts)),
                    images=self.batch_size,
                )
        self.pending.clear()
        self.rates.clear()
        self.clock = time.perf_counter()

    def restart_clock(self, paused: bool) -> None:
        """Leave the time of evaluations and checkpoints out of the images per second."""
        if paused:
            self.clock = time.perf_counter()
