"""Training on the hardest images of each microbatch alone, `[train.select]` in the configuration.

A forward pass without gradients, with the weights as they are, gives the loss of every image of a microbatch; those of
the highest losses are kept, and the step is one on these (Jordan 2024, airbench96, whose smaller proxy network chooses
half of each batch). It is a function of the weights and the microbatch alone: no rank needs to know of another, and a
run that is resumed needs no state for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.settings import TrainConfig
from dist_train.data.batches import Data, Microbatch
from dist_train.distributed.device import autocast
from dist_train.model.network import BlockNetwork
from dist_train.training.batch_norm import batch_mode


class Selection:
    """Chooses the images that a run is trained on."""

    def __init__(self, settings: TrainConfig, data: Data, model: BlockNetwork, network: nn.Module) -> None:
        """network: the model, or the same compiled."""
        self.settings, self.data = settings, data
        self.model, self.network = model, network

    def kept(self, step: int) -> int:
        """The number of images of each microbatch that are kept after `step` finished steps."""
        select = self.settings.select
        return select.kept(self.data.size) if select.active(step, self.data.total_steps) else self.data.size

    def flops(self, step: int) -> int:
        """Floating-point operations of choosing, for the global batch after `step` finished steps."""
        if self.kept(step) == self.data.size:
            return 0
        return self.settings.batch_size * self.model.forward_flops(*self._size(step))

    @torch.no_grad()
    def __call__(self, batch: Microbatch, step: int) -> Microbatch:
        """The images of a microbatch with the highest losses, in the order that they have in it; of equal losses the
        first images. All of them where the step does not select. Leaves the network in training mode."""
        if (kept := self.kept(step)) == self.data.size:
            return batch
        images, size = batch.images, self._size(step)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        batch_mode(self.model)  # without dropout
        # autocast would keep weights that it casts here, without their gradients, for the training pass
        with autocast(images.device, self.settings.precision, cache=False):
            logits: Tensor = self.network(images)
        self.model.train()
        losses = F.cross_entropy(
            logits.float(), batch.labels, reduction="none", label_smoothing=self.settings.label_smoothing
        )
        chosen = hardest(losses, kept)
        images = batch.images[chosen].contiguous(memory_format=torch.channels_last)
        return replace(batch, images=images, labels=batch.labels[chosen], indices=batch.indices[chosen])

    def _size(self, step: int) -> tuple[int, int]:
        return self.settings.select.image_size(*self.data.image_size(step))


def hardest(losses: Tensor, count: int) -> Tensor:
    """The positions of the `count` highest of the losses, (n,), in ascending order; of equal ones the first. One that
    is not a number counts as the highest, so that it is noticed."""
    return losses.sort(descending=True, stable=True).indices[:count].sort().values
