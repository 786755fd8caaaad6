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
from dist_train.distributed.gradient_sum import FixedOrderSum, largest
from dist_train.distributed.ranks import Ranks
from dist_train.model.network import BlockNetwork
from dist_train.randomness import derive
from dist_train.runs.checkpoint import Checkpoint
from dist_train.signals import StopRequest
from dist_train.training.batch_norm import measure_statistics
from dist_train.training.cuda_graphs import MicrobatchGraphs
from dist_train.training.evaluation import evaluate
from dist_train.training.optimizers import Optimizers
from dist_train.training.run_writer import Writer
from dist_train.training.schedule import Kind, Schedule, kind_of, kinds
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
        device, select = next(model.parameters()).device, config.train.select
        graphs = config.train.cuda_graphs and device.type == "cuda"
        optimizers = Optimizers(model, config.optim, total_steps, graphs)
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
        """On a GPU, with `train.cuda_graphs`, the kinds of steps from `state.step` on are recorded."""
        self.settings, self.data, self.state = settings, data, state
        sizes = 1 + len(data.config.smaller)  # of images
        # each with and without the stem's gradient, on all images or selected ones
        self.network = _compiled(state.model, settings, variants=4 * sizes) if settings.compile else state.model
        self.gradients = FixedOrderSum(ranks, self.network, settings.microbatches)
        self.autocast = autocast(ranks.device, settings.precision)
        self.flops = cache(state.model.training_flops)
        model = state.model.config
        self.dropout = model.output.dropout > 0 or any(block.dropout > 0 for block in model.blocks)
        self.selection = Selection(settings, data, state.model, state.losses)
        self.casts: list[Tensor] = []  # the kernels in the autocast's dtype, as graphs read them
        self.graphs: MicrobatchGraphs | None = None
        if settings.cuda_graphs and ranks.on_gpu:
            if settings.precision != "fp32" and not settings.compile:
                dtype = DTYPES[settings.precision]
                self.casts = [kernel.detach().to(dtype).requires_grad_() for kernel in state.model.kernels]
            self.graphs = self._recorded(ranks.device)
        else:
            self.gradients.wrap()

    def __call__(self, microbatches: list[Microbatch]) -> StepMetrics:
        """Run the step after `state.step`, and increment that. microbatches: those of this rank, in order."""
        settings, state = self.settings, self.state
        rate = state.optimizers.set_rates(state.step)
        kind = kind_of(state.step, self.data, state.optimizers, self.selection)
        parts = self._replayed(microbatches, kind) if self.graphs else self._launched(microbatches, kind)
        norm = state.optimizers.step(state.scaler)
        images = kind.kept * settings.microbatches
        flops = images * self.flops(kind.height, kind.width, kind.stem_learns) + self.selection.flops(state.step)
        state.step += 1
        return StepMetrics(torch.stack(parts), norm, rate, images, flops)

    def _launched(self, microbatches: list[Microbatch], kind: Kind) -> list[Tensor]:
        """Run the microbatches through DDP. Returns the metrics of each, as StepMetrics has them, and leaves the sum of
        all gradients in every parameter's `grad`."""
        parts = []
        with self.autocast, self._kernels_cast():  # around all microbatches, so that weights are cast once a step
            for index, whole in enumerate(microbatches):
                batch = self.selection(whole, self.state.step)
                self._seed_dropout(batch)
                with self.gradients.microbatch(index) as gradient:
                    loss, correct = self.forward_backward(self.gradients.wrap(), batch, kind)
                parts.append(torch.stack((loss.double(), correct.double(), gradient.largest.double())))
        return parts

    def _replayed(self, microbatches: list[Microbatch], kind: Kind) -> list[Tensor]:
        """The same as `_launched`, by CUDA graphs."""
        assert self.graphs is not None
        parts = []
        if self.casts:
            with torch.no_grad():
                torch._foreach_copy_(self.casts, self.state.model.kernels)
        self.graphs.begin()
        for index, batch in enumerate(microbatches):
            self._seed_dropout(batch)
            gradient, metrics = self.graphs(index, kind, batch)
            self.gradients.add(index, gradient)
            parts.append(metrics)
        return parts

    def _seed_dropout(self, batch: Microbatch) -> None:
        # dropout draws from torch's global generator, so this makes it independent of the ranks
        if self.dropout:
            torch.manual_seed(derive(self.settings.seed, "microbatch", self.state.step, batch.slot))

    def _kernels_cast(self) -> AbstractContextManager[None]:
        if self.settings.compile:  # compiled code casts weights where it reads them
            return nullcontext()
        dtype = DTYPES[self.settings.precision]
        return self.state.model.kernels_cast([kernel.to(dtype) for kernel in self.state.model.kernels])

    def forward_backward(
        self,
        network: nn.Module,
        batch: Microbatch,
        kind: Kind,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> tuple[Tensor, Tensor]:
        """One microbatch forward and backward, inside the step's autocast. backward: given the objective, a scalar,
        computes its gradients. Returns the summed loss, float32, and the number of correct images, int64: scalars on
        the device."""
        logits: Tensor = network(batch.images, kind.stem_learns)
        with torch.autocast(logits.device.type, enabled=False):
            cross_entropy = partial(F.cross_entropy, label_smoothing=self.settings.label_smoothing)
            if self.state.losses:
                losses: Tensor = cross_entropy(logits.float(), batch.labels, reduction="none")
                self.state.losses.record(batch.indices, losses.detach())
                loss = losses.sum()
            else:
                loss = cross_entropy(logits.float(), batch.labels, reduction="sum")
            backward(self.state.scaler.scale(loss / (kind.kept * self.settings.microbatches)))
        return loss.detach(), (logits.argmax(1) == batch.labels).sum()

    def _recorded(self, device: torch.device) -> MicrobatchGraphs:
        """The microbatches of all kinds of steps that are left, as CUDA graphs. Leaves the state as it is."""
        state, data = self.state, self.data
        numbers = sum(parameter.numel() for parameter in self.gradients.parameters)
        # graphs that run at the same time would read the same seed
        graphs = MicrobatchGraphs(device, numbers, at_once=1 if self.dropout else len(self.gradients.slots))
        kept = [tensor.clone() for tensor in state.losses.tensors] if state.losses else []
        for kind, steps in kinds(data, state.optimizers, self.selection, state.step):
            images = torch.zeros(kind.size, state.model.channels, kind.height, kind.width, device=device)
            labels = torch.arange(kind.size, device=device)
            batch = Microbatch(0, images.to(memory_format=torch.channels_last), torch.zeros_like(labels), labels)
            graphs.record(kind, batch, partial(self._without_ddp, kind, steps.start))
        if state.losses:
            torch._foreach_copy_(state.losses.tensors, kept)
        return graphs

    def _without_ddp(self, kind: Kind, step: int, batch: Microbatch, gradient: Tensor, metrics: Tensor) -> None:
        """One microbatch of a step, whose flat gradient and metrics are written into the last two arguments."""
        model, parameters = self.state.model, self.gradients.parameters

        def backward(objective: Tensor) -> None:
            grads = torch.autograd.grad(objective, [*parameters, *self.casts], allow_unused=True)
            of_casts = dict(zip(map(id, model.kernels), grads[len(parameters) :], strict=False))
            by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}  # of one dtype they are copied together
            for view, parameter, own in zip(self.gradients.views(gradient), parameters, grads, strict=False):
                grad = of_casts[id(parameter)] if own is None else own
                by_dtype.setdefault(grad.dtype, []).append((view, grad))
            for pairs in by_dtype.values():
                views, whole = zip(*pairs, strict=True)
                torch._foreach_copy_(views, whole)

        with self.autocast, model.kernels_cast(self.casts) if self.casts else nullcontext():
            loss, correct = self.forward_backward(self.network, self.selection(batch, step), kind, backward)
        metrics.copy_(torch.stack((loss.double(), correct.double(), largest([gradient]).double())))


def _compiled(model: BlockNetwork, settings: TrainConfig, variants: int) -> nn.Module:
    """The network compiled. variants: the most graphs that a run needs."""
    # Beyond the limit torch would run the network uncompiled, and so with other bits. A run has two networks: the one
    # that it trains and its copy of the warm-up.
    torch._dynamo.config.recompile_limit = max(2 * variants, torch._dynamo.config.recompile_limit)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # TF32 stays off: it changes bits
    warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # by microseconds a step
    warnings.filterwarnings("ignore", ".*Function'> should not be instantiated")  # torch 2.9's compiler itself does
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns of a CUDA toolkit without a GPU
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)  # the compiler reads this one
    compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return compiled
