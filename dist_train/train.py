"""The training loop. Its only state is (weights, optimizer, BatchNorm rows, step)."""

from __future__ import annotations

import hashlib
import logging
import math
import time
import warnings
from dataclasses import dataclass
from signal import Signals
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.checkpoint import Writer
from dist_train.data import Data
from dist_train.distributed import Ranks, gather_shares
from dist_train.errors import DivergedError
from dist_train.evaluate import evaluate
from dist_train.model import BatchNorm, BlockNetwork, whiten
from dist_train.optim import Optimizers
from dist_train.randomness import derive
from dist_train.record import Recorder
from dist_train.reduction import FixedOrderSum
from dist_train.settings import CheckpointConfig, EvaluateConfig, ModelConfig, TrainConfig
from dist_train.stopping import StopRequest

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WHITENING_PIXELS = 5000 * 32 * 32


def total_steps(settings: TrainConfig, data: Data) -> int:
    """Steps of the whole run; the last epoch's fraction is rounded up to whole ones."""
    return math.ceil(settings.epochs * data.steps_per_epoch)


def build_model(architecture: ModelConfig, settings: TrainConfig, data: Data) -> BlockNetwork:
    """The network with its initial weights, a function of the seed and the data set, on the CPU."""
    height, width, channels = data.manifest.image_shape
    torch.manual_seed(derive(settings.seed, "init"))
    model = BlockNetwork(architecture, (channels, height, width), len(data.manifest.classes), settings.microbatches)
    if model.stem is not None and architecture.stem.kind == "whiten":
        whiten(model.stem, data.sample(max(1, _WHITENING_PIXELS // (height * width))))
    return model


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
    meter = _Meter(settings, ranks, data, recorder)
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


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """The first 16 hexadecimal digits of the SHA-256 of each weight's and BatchNorm row's bytes, by name."""
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest()[:16] for name, tensor in model.state_dict().items()}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of all weights and BatchNorm rows: equal exactly when they are."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


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


class _Meter:
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
