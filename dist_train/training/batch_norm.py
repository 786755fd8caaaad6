"""The statistics of the BatchNorms in evaluation, measured on training images (Wu and Johnson 2021, "Rethinking 'Batch'
in BatchNorm", section 3: PreciseBN)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data.batches import Data
from dist_train.distributed.ranks import Ranks, gather_shares, sum_integers
from dist_train.model.network import BatchNorm, BlockNetwork, check_finite


@torch.no_grad()
def measure_statistics(model: BlockNetwork, data: Data, ranks: Ranks, autocast: torch.autocast) -> None:
    """Set `mean` and `var` of every BatchNorm to those of training images at the current weights.

    They are a function of the weights alone: the average, in a fixed order, over the same batches of images at every
    step and for any number of ranks. Leaves the network in training mode. Raises NotFiniteError, on all ranks, when a
    weight or a statistic is not finite.
    """
    norms = _norms(model)
    if norms:
        widths = [len(norm.mean) for norm in norms for _ in range(2)]
        share = ranks.share(data.statistics_batches)
        own = torch.zeros(len(share), sum(widths), device=ranks.device)  # means and variances of each batch
        seen: dict[BatchNorm, tuple[Tensor, Tensor]] = {}

        def collect(norm: BatchNorm, inputs: tuple[Tensor]) -> None:
            seen[norm] = _statistics(norm, *inputs)

        hooks = [norm.register_forward_pre_hook(collect) for norm in norms]
        batch_mode(model)
        try:
            for row, (images, _) in zip(own, data.statistics(), strict=True):
                with autocast:
                    model(images)
                row.copy_(torch.cat([values for norm in norms for values in seen[norm]]))
        finally:
            model.train()
            for hook in hooks:
                hook.remove()
        averages = gather_shares(ranks, own, data.statistics_batches).mean(0).split(widths)
        for norm, mean, var in zip(norms, averages[::2], averages[1::2], strict=True):
            norm.mean.copy_(mean)
            norm.var.copy_(var)
    check_finite(model)


@torch.no_grad()
def accuracy_by_mode(model: BlockNetwork, data: Data, ranks: Ranks, autocast: torch.autocast) -> tuple[float, float]:
    """The fractions of the images of `data.statistics` that are classified correctly with the BatchNorm statistics of
    each microbatch, as in training, and with the measured ones, as in evaluation; both without dropout."""
    correct = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    for images, labels in data.statistics():
        parts = max(1, len(images) // data.size)
        for some, of_some in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            modes: list[Callable[[BlockNetwork], object]] = [batch_mode, BlockNetwork.eval]
            for position, enter in enumerate(modes):
                enter(model)
                with autocast:
                    logits = model(some)
                correct[position] += (logits.argmax(1) == of_some).sum()
            correct[2] += len(some)
    model.train()
    training, evaluation, images_seen = sum_integers(ranks, correct).tolist()
    return training / images_seen, evaluation / images_seen


def _norms(model: BlockNetwork) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def batch_mode(model: BlockNetwork) -> None:
    """Evaluation mode, but for the BatchNorms, which use the statistics of their batch."""
    model.eval()
    for norm in _norms(model):
        norm.train()


def _statistics(norm: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance of the channels of x, (N, C, H, W): twice (C,) float32."""
    mean, var = torch.zeros_like(norm.mean), torch.ones_like(norm.var)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    return mean, var
