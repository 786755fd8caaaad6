"""The training loop. Its only state is (weights, optimizer, BatchNorm rows, step)."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.settings import CheckpointConfig, EvaluateConfig, TrainConfig
from dist_train.data.batches import Data
from dist_train.distributed.device import DTYPES
from dist_train.distributed.gradient_sum import FixedOrderSum
from dist_train.distributed.ranks import Ranks, gather_shares
from dist_train.model.network import BatchNorm, BlockNetwork, tensor_digests
from dist_train.randomness import derive
from dist_train.runs.checkpoint import Writer
from dist_train.runs.metrics import Recorder
from dist_train.signals import StopRequest
from dist_train.training.evaluation import evaluate
from dist_train.training.optimizers import Optimizers
from dist_train.training.step_log import StepLog


def train(
    settings: TrainConfig,
    testing: EvaluateConfig,
    saving: CheckpointConfig,
    model: BlockNetwork,
    optimizers: Optimizers,
    data: Data,
    ranks: Ranks,
    start: dict[str, Any] | None,
    stop: StopRequest,
    recorder: Recorder | None,
    writer: Writer | None,
    digest_every: int = 0,
) -> tuple[int, str]:
    """Train `model`, which is on the rank's device, from the checkpoint's state `start`, or from the first step
    without one, to the last epoch or until a rank is asked to stop. After it the network is the same on every rank.

    recorder, writer: on rank 0 only; the first was opened at the step of `start`. digest_every: steps between two
    digests of the weights in the record, besides those of every epoch's end. Returns the number of finished
    steps, and what stopped the run before the last, "" for nothing; a checkpoint of it is being written then.
    Raises DivergedError when the loss or a gradient is no longer finite.
    """
    steps_per_epoch, last_step = data.steps_per_epoch, optimizers.total_steps
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision == "fp16")
    state = _State(model, optimizers, scaler)
    step = state.load(start) if start else 0
    compiled: nn.Module = model
    if settings.compile:
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # not enabled, so that bits stay
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # of a CUDA toolkit without a GPU
        torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)  # tells the compiler too
        compiled = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    gradients = FixedOrderSum(ranks, compiled, settings.microbatches)
    autocast = torch.autocast(ranks.device.type, DTYPES[settings.precision], enabled=settings.precision != "fp32")
    meter = StepLog(settings, ranks, data, recorder)
    log_every = settings.log_every or (20 if ranks.device.type == "cuda" else 1)
    slots = torch.arange(settings.microbatches, device=ranks.device)

    steps = data.steps(step)
    stopped = ""
    while step < last_step and not stopped:
        ranks.begin(step + 1)
        rate = optimizers.set_rates(step)
        model.stem_learns = optimizers.learns("stem", step)
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
            meter.add(loss, (logits.argmax(1) == batch.labels).sum(), gradients.largest)
        meter.end_step(rate, optimizers.step(scaler), model.training_flops(*data.image_size(step)))
        step += 1

        epoch, within = divmod(step, steps_per_epoch)
        save = step == last_step or saving.due(step, steps_per_epoch)
        digest = within == 0 or step == last_step or (digest_every > 0 and step % digest_every == 0)
        if save or digest or step % log_every == 0:
            # stops the run before what is not finite reaches a checkpoint
            stopped = meter.flush(step, stop.received if step < last_step else 0)
            save = save or bool(stopped)
        if save or digest:
            _gather_batch_norm(model, ranks)
        if digest and recorder is not None:
            recorder.weights(step=step, digests=tensor_digests(model))
        if step == last_step or (within == 0 and epoch % testing.every == 0):
            if recorder is not None:
                recorder.say("evaluating")
            tta = testing.tta if step == last_step else "none"
            found = {name: evaluate(model, data, split, ranks, autocast, tta) for name, split in data.evaluated()}
            if recorder is not None:
                figures = {f"{name}_{key}": value for name, e in found.items() for key, value in e.figures.items()}
                coefficients = found["test"].coefficients()
                recorder.eval(
                    step=step, epoch=step / steps_per_epoch if within else epoch, coefficients=coefficients, **figures
                )
                if step == last_step:
                    recorder.evaluation(found["test"].details(data, step))
        if save and writer is not None:
            writer.write(step, state.dump(step))
        meter.restart_clock(save or digest)
    return step, stopped


@dataclass(frozen=True)
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


@torch.no_grad()
def _gather_batch_norm(model: BlockNetwork, ranks: Ranks) -> None:
    """Give every rank all rows of the BatchNorms, each from the rank that runs its microbatch."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            for rows in (module.rows_mean, module.rows_var):
                share = ranks.share(len(rows))
                rows.copy_(gather_shares(ranks, rows[share.start : share.stop], len(rows)))
