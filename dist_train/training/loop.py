"""The training loop. Its only state is (weights, optimizer, step), and the images' losses where they choose images."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.settings import Config, TrainConfig
from dist_train.data.batches import Data, Microbatch
from dist_train.distributed.device import DTYPES, autocast
from dist_train.distributed.gradient_sum import FixedOrderSum
from dist_train.distributed.ranks import Ranks
from dist_train.model.network import BlockNetwork
from dist_train.randomness import derive
from dist_train.runs.checkpoint import Checkpoint
from dist_train.signals import StopRequest
from dist_train.training.batch_norm import measure_statistics
from dist_train.training.evaluation import evaluate
from dist_train.training.optimizers import Optimizers
from dist_train.training.run_writer import Writer
from dist_train.training.schedule import Schedule
from dist_train.training.selection import LastLosses, Selection
from dist_train.training.step_log import StepLog, StepMetrics


@dataclass
class State:
    """Everything that a run needs to resume, besides its configuration. step: finished steps. losses: where
    `train.select` chooses by them."""

    model: BlockNetwork
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    step: int = 0
    losses: LastLosses | None = None

    @classmethod
    def start(cls, config: Config, model: BlockNetwork, total_steps: int, images: int) -> State:
        """The state before the first step. model: on this rank's device. images: in the training set."""
        optimizers, select = Optimizers(model, config.optim, total_steps), config.train.select
        device = next(model.parameters()).device
        scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        losses = LastLosses(images, device) if select.fraction < 1 and select.losses == "last" else None
        return cls(model, optimizers, scaler, losses=losses)

    def dump(self) -> dict[str, Any]:
        """The state as it is stored in a checkpoint; the tensors are not copied."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state(),
            "scaler": self.scaler.state_dict(),
            **({"losses": self.losses.values} if self.losses else {}),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint. Raises ValueError and others where it is one of another configuration."""
        if self.losses:
            if checkpoint.losses is None or checkpoint.losses.shape != self.losses.values.shape:
                raise ValueError("it has no loss of each training image")
            self.losses.values.copy_(checkpoint.losses)
        self.model.load_state_dict(checkpoint.model)
        self.optimizers.load(checkpoint.optimizers)
        self.scaler.load_state_dict(checkpoint.scaler)
        self.step = checkpoint.step


def train(config: Config, data: Data, ranks: Ranks, state: State, writer: Writer, stop: StopRequest) -> str:
    """Train from `state.step` to the last step, or until a rank is asked to stop.

    state: on this rank's device; the same on every rank before and after. writer: on rank 0 a RunWriter, a null object
    elsewhere. Returns the stop signal and its rank, "" when the run reached its last step. The checkpoint of the last
    step may still be in writing then.
    Raises DivergedError, on every rank, when a loss, a gradient, a weight or an evaluation is no longer finite.
    """
    train_step = TrainStep(config.train, data, ranks, state)
    schedule = Schedule(config, data, config.train.log_every or (20 if ranks.on_gpu else 1))
    log = StepLog(config.train, data, ranks, writer, state.step)
    batches = data.steps(state.step)
    cast = autocast(ranks.device, config.train.precision)
    stopped = ""
    while state.step < data.total_steps and not stopped:
        # one optimizer step on the next global batch
        ranks.begin(state.step + 1)
        log.add(train_step(next(batches)))

        # exchange losses and stop requests; a loss that is not finite raises here, before any checkpoint
        due, last = schedule.after(state.step), state.step == data.total_steps
        if due.exchange:
            stopped = log.exchange(state.step, 0 if last else stop.received)
        saves = due.checkpoint or bool(stopped)

        # the BatchNorm statistics belong to the weights that are saved, digested or evaluated
        if saves or due.digest:
            if state.losses:  # also at the end of every epoch, before another step chooses by them
                state.losses.exchange(ranks)
            with log.finite(state.step):
                measure_statistics(state.model, train_step.selection, ranks, cast, state.step)
        if due.digest:
            writer.weights(state.step, state.model)
        if due.evaluation:
            writer.phase("evaluating")
            tta = config.evaluate.tta if last else "none"
            with log.finite(state.step):
                evaluations = {
                    name: evaluate(state.model, data, split, ranks, cast, tta) for name, split in data.evaluated()
                }
            writer.evaluation(state.step, schedule.epoch(state.step), evaluations, data, last)
        if saves:
            writer.checkpoint(state.step, state.dump())
        if saves or due.digest:
            log.restart_clock()
    return stopped


class TrainStep:
    """One optimizer step: this rank's microbatches forward and backward, the sum of all gradients, the update."""

    def __init__(self, settings: TrainConfig, data: Data, ranks: Ranks, state: State) -> None:
        self.settings, self.data, self.state = settings, data, state
        sizes = 1 + len(data.config.smaller)  # of images
        # each with and without the stem's gradient, on all images or selected ones, trained on or selected from
        network = _compiled(state.model, settings, variants=8 * sizes) if settings.compile else state.model
        self.gradients = FixedOrderSum(ranks, network, settings.microbatches)
        self.autocast = autocast(ranks.device, settings.precision)
        # compiled code casts weights where it reads them
        cast = partial(state.model.kernels_cast, DTYPES[settings.precision])
        self.kernels_cast: Callable[[], AbstractContextManager[None]] = nullcontext if settings.compile else cast
        self.flops = cache(state.model.training_flops)
        self.selection = Selection(settings, data, state.model, network, state.losses)

    def __call__(self, microbatches: list[Microbatch]) -> StepMetrics:
        """Run the step after `state.step`, and increment that. microbatches: those of this rank, in order."""
        settings, state = self.settings, self.state
        rate = state.optimizers.set_rates(state.step)
        stem_learns = state.optimizers.learns("stem", state.step)
        images = self.selection.kept(state.step) * settings.microbatches
        parts = []
        with self.autocast, self.kernels_cast():  # around all microbatches, so that weights are cast once a step
            for index, whole in enumerate(microbatches):
                batch = self.selection(whole, state.step)
                # dropout draws from torch's global generator, so this makes it independent of the ranks
                torch.manual_seed(derive(settings.seed, "microbatch", state.step, batch.slot))
                with self.gradients.microbatch(index) as gradient:
                    loss, correct = self.forward_backward(self.gradients.ddp, batch, images, stem_learns)
                parts.append(torch.stack((loss.double(), correct.double(), gradient.largest.double())))
        norm = state.optimizers.step(state.scaler)
        flops = images * self.flops(*self.data.image_size(state.step), stem_learns)
        flops += self.selection.flops(state.step)
        state.step += 1
        return StepMetrics(torch.stack(parts), norm, rate, images, flops)

    def forward_backward(
        self, network: nn.Module, batch: Microbatch, images: int, stem_learns: bool
    ) -> tuple[Tensor, Tensor]:
        """One microbatch forward and backward, inside the step's autocast. images: of the global batch, by which the
        loss is divided. Returns its summed loss, float32, and the number of correct images, int64: scalars on the
        device."""
        logits: Tensor = network(batch.images, stem_learns)
        with torch.autocast(logits.device.type, enabled=False):
            cross_entropy = partial(F.cross_entropy, label_smoothing=self.settings.label_smoothing)
            if self.state.losses:
                losses: Tensor = cross_entropy(logits.float(), batch.labels, reduction="none")
                self.state.losses.record(batch.indices, losses.detach())
                loss = losses.sum()
            else:
                loss = cross_entropy(logits.float(), batch.labels, reduction="sum")
            self.state.scaler.scale(loss / images).backward()
        return loss.detach(), (logits.argmax(1) == batch.labels).sum()


def _compiled(model: BlockNetwork, settings: TrainConfig, variants: int) -> nn.Module:
    """The network compiled. variants: the most graphs that a run needs."""
    # Beyond the limit torch would run the network uncompiled, and so with other bits. A run has two networks: the one
    # that it trains and its copy of the warm-up.
    torch._dynamo.config.recompile_limit = max(2 * variants, torch._dynamo.config.recompile_limit)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # TF32 stays off: it changes bits
    warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # by microseconds a step
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of a CUDA toolkit without a GPU
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)  # the compiler reads this one
    compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return compiled
