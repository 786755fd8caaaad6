"""The statistics of the BatchNorms in evaluation, measured on training images (Wu and Johnson 2021, "Rethinking 'Batch'
in BatchNorm", section 3: PreciseBN)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.distributed.ranks import Ranks, gather_shares, sum_integers
from dist_train.model.network import BatchNorm, BlockNetwork, check_finite
from dist_train.training.selection import Selection


@torch.no_grad()
def measure_statistics(
    model: BlockNetwork, selection: Selection, ranks: Ranks, autocast: torch.autocast, step: int
) -> None:
    """Set `mean` and `var` of every BatchNorm to those of training images at the weights after `step` finished steps.

    A network that is trained on the hardest images of each microbatch has learnt with their statistics: it gets those
    of the hardest here too. The statistics are a function of the weights and the step alone: the average, in a fixed
    order, over the same batches of images at every step and for any number of ranks. Leaves the network in training
    mode. Raises NotFiniteError, on all ranks, when a weight or a statistic is not finite.
    """
    norms = _norms(model)
    if norms:
        widths = [len(norm.mean) for norm in norms for _ in range(2)]
        batches = selection.data.statistics_batches
        share = ranks.share(batches)
        own = torch.zeros(len(share), sum(widths), device=ranks.device)  # means and variances of each batch
        seen: dict[BatchNorm, tuple[Tensor, Tensor]] = {}

        def collect(norm: BatchNorm, inputs: tuple[Tensor]) -> None:
            seen[norm] = _statistics(norm, *inputs)

        for row, parts in zip(own, selection.statistics(step), strict=True):
            images = torch.cat([part.images for part in parts])
            model.batch_mode()
            hooks = [norm.register_forward_pre_hook(collect) for norm in norms]
            try:
                with autocast:
                    model(images)
            finally:
                model.train()
                for hook in hooks:
                    hook.remove()
            row.copy_(torch.cat([values for norm in norms for values in seen[norm]]))
        averages = gather_shares(ranks, own, batches).mean(0).split(widths)
        for norm, mean, var in zip(norms, averages[::2], averages[1::2], strict=True):
            norm.mean.copy_(mean)
            norm.var.copy_(var)
    check_finite(model)


@torch.no_grad()
def accuracy_by_mode(
    model: BlockNetwork, selection: Selection, ranks: Ranks, autocast: torch.autocast, step: int
) -> tuple[float, float, int]:
    """The fractions of the images of `selection.statistics` that are classified correctly with the BatchNorm statistics
    of each microbatch, as in training, and with the measured ones, as in evaluation; both without dropout. Then the
    number of these images."""
    correct = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    for parts in selection.statistics(step):
        for part in parts:
            modes: list[Callable[[BlockNetwork], object]] = [BlockNetwork.batch_mode, BlockNetwork.eval]
            for position, enter in enumerate(modes):
                enter(model)
                with autocast:
                    logits = model(part.images)
                correct[position] += (logits.argmax(1) == part.labels).sum()
            correct[2] += len(part.labels)
    model.train()
    training, evaluation, count = sum_integers(ranks, correct).tolist()
    return training / count, evaluation / count, count


def _norms(model: BlockNetwork) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def _statistics(norm: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance of the channels of x, (N, C, H, W): twice (C,) float32."""
    mean, var = torch.zeros_like(norm.mean), torch.ones_like(norm.var)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    return mean, var
