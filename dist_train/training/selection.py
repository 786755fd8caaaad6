"""Training on the hardest images of each microbatch alone, `[train.select]` in the configuration.

The images of the highest losses are kept, and the step is one on these. The losses are of one of two kinds:

- `now`: a forward pass without gradients, with the weights as they are, gives the loss of every image (Jordan 2024,
  airbench96, whose smaller proxy network chooses half of each batch). It is a function of the weights and the
  microbatch alone: no rank needs to know of another, and a run that is resumed needs no state for it.
- `last`: the losses of the last step that trained on each image (as in InfoBatch, Qin et al. 2024). They cost no
  operations, and are a part of the run's state. The ranks exchange them once an epoch, which is enough: an image is in
  one step of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.config.settings import TrainConfig
from dist_train.data.batches import Data, Microbatch
from dist_train.distributed.device import autocast, written_once
from dist_train.distributed.ranks import Ranks, sum_integers
from dist_train.model.network import BlockNetwork


class LastLosses:
    """The loss of each training image in the last step that trained on it. Infinite where none did: it counts as the
    hardest.

    values: (n,) float32, on the device; the same on all ranks after an exchange, and for images of earlier epochs.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        """count: the number of training images."""
        self.values = torch.full((count,), torch.inf, device=device)
        self.own = torch.zeros(count, dtype=torch.bool, device=device)  # of this rank since the last exchange

    @property
    def tensors(self) -> list[Tensor]:
        """All that `record` changes."""
        return [self.values, self.own]

    def record(self, indices: Tensor, losses: Tensor) -> None:
        """Set the losses, (n,), of the images of a microbatch."""
        with written_once():
            self.values[indices] = losses.float()
            self.own.index_fill_(0, indices, True)

    def exchange(self, ranks: Ranks) -> None:
        """Give every rank the losses that others have recorded since the last exchange. All ranks must call it."""
        if ranks.world_size > 1:
            # as integers, whose sums are exact: of each image one rank has the bits, the others zero
            bits = torch.stack((self.values.view(torch.int32), self.own)).long() * self.own
            found, known = sum_integers(ranks, bits).to(self.values.device).int()
            self.values.copy_(torch.where(known > 0, found.view(torch.float32), self.values))
        self.own.zero_()


class Selection:
    """Chooses the images that a run is trained on."""

    def __init__(
        self,
        settings: TrainConfig,
        data: Data,
        model: BlockNetwork,
        losses: LastLosses | None,
    ) -> None:
        """model: chooses by a forward pass, which is not compiled: up to torch 2.11 at least the compiler cannot trace
        the mixing without gradients. losses: where they choose, else None."""
        self.settings, self.data, self.model, self.losses = settings, data, model, losses

    def kept(self, step: int) -> int:
        """The number of images of each microbatch that are kept after `step` finished steps."""
        select = self.settings.select
        return select.kept(self.data.size) if select.active(step, self.data.total_steps) else self.data.size

    def flops(self, step: int) -> int:
        """Floating-point operations of choosing, for the global batch after `step` finished steps."""
        if self.losses or self.kept(step) == self.data.size:
            return 0
        size = self.settings.select.image_size(*self.data.image_size(step))
        return self.settings.batch_size * self.model.forward_flops(*size)

    @torch.no_grad()
    def __call__(self, batch: Microbatch, step: int) -> Microbatch:
        """The images of a microbatch with the highest losses, in the order that they have in it; of equal losses the
        first images. All of them where the step does not select. Leaves the network in training mode."""
        kept = self.kept(step)
        return batch if kept == self.data.size else self._keep(batch, kept)

    @torch.no_grad()
    def statistics(self, step: int) -> Iterator[list[Microbatch]]:
        """Each batch of `data.statistics`, in parts of as many images as a microbatch has. Of each part those that a
        step is trained on: the hardest, where the last of `step` finished steps chose."""
        select, chooses = self.settings.select, self.kept(max(0, step - 1)) < self.data.size
        for batch in self.data.statistics():
            count = max(1, len(batch[0]) // self.data.size)
            split = zip(range(count), *(whole.tensor_split(count) for whole in batch), strict=True)
            parts = [Microbatch(*part) for part in split]
            if chooses:
                parts = [self._keep(part, select.kept(len(part.labels))) for part in parts]
            yield parts

    def _keep(self, batch: Microbatch, count: int) -> Microbatch:
        """The `count` hardest images of a microbatch."""
        chosen = hardest(self._losses(batch), count)
        images = batch.images[chosen].contiguous(memory_format=torch.channels_last)
        return replace(batch, images=images, labels=batch.labels[chosen], indices=batch.indices[chosen])

    def _losses(self, batch: Microbatch) -> Tensor:
        """The loss by which each image is chosen: (n,) float32. Leaves the network in training mode."""
        if self.losses:
            return self.losses.values[batch.indices]
        images, labels = batch.images, batch.labels
        size = self.settings.select.image_size(images.shape[2], images.shape[3])
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        self.model.batch_mode()  # without dropout
        # autocast would keep weights that it casts here, without their gradients, for the training pass
        with autocast(images.device, self.settings.precision, cache=False):
            logits: Tensor = self.model(images)
        self.model.train()
        return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=self.settings.label_smoothing)


def hardest(losses: Tensor, count: int) -> Tensor:
    """The positions of the `count` highest of the losses, (n,), in ascending order; of equal ones the first. One that
    is not a number counts as the highest, so that it is noticed."""
    return losses.sort(descending=True, stable=True).indices[:count].sort().values
