"""From betons to microbatches on the device: which samples, in which order, with which augmentation.

`resident` reads a whole set once onto the device; `stream` leaves it in its file, for sets that do not fit, and reads
it through ffcv's Loader, or without ffcv from a memory map. All give the same indices and the same augmented pixels,
because they only read: order and augmentation are computed here, from the seed, the epoch and the sample's index alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train import data_prep
from dist_train.config.settings import DataConfig, Smaller, check_batch
from dist_train.data.augment import augment, cut_out, resize
from dist_train.data.dataset import check_images
from dist_train.data.loaders import Resident, Stream
from dist_train.distributed.ranks import Ranks
from dist_train.randomness import derive, permutation, sample_bits


@dataclass(frozen=True)
class Microbatch:
    """images: (n, C, H, W) float32, normalised, channels_last; labels and indices: (n,) int64; all on the
    device. slot: its place in the global batch."""

    slot: int
    images: Tensor
    labels: Tensor
    indices: Tensor


class Data:
    """The training and evaluation batches of one rank."""

    def __init__(
        self,
        config: DataConfig,
        manifest: data_prep.Manifest,
        ranks: Ranks,
        batch_size: int,
        microbatches: int,
        seed: int,
    ) -> None:
        """batch_size: images in a global batch of `microbatches` parts. Raises UserError when the batch does
        not split or the training set is too small for it."""
        check_batch(batch_size, microbatches)
        check_images(config, manifest, batch_size)
        count = manifest.splits["train"].count
        self.config, self.manifest, self.ranks, self.seed = config, manifest, ranks, seed
        self.batch_size, self.size = batch_size, batch_size // microbatches
        self.slots = ranks.share(microbatches)
        # the same held-out images for every seed, so that runs can be compared
        shuffled = permutation(count, derive(0, "holdout")) if config.holdout else torch.arange(count)
        self.indices = {
            "train": shuffled[config.holdout :].sort().values,
            "holdout": shuffled[: config.holdout].sort().values,
            "test": torch.arange(manifest.splits["test"].count),
        }
        self.steps_per_epoch = len(self.indices["train"]) // batch_size
        source = Resident if config.loader == "resident" else Stream
        self.sources = {split: source(config, split, ranks.device) for split in ("train", "test")}
        mean, std = (torch.tensor(values, device=ranks.device) for values in (manifest.mean, manifest.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def steps(self, first: int) -> Iterator[list[Microbatch]]:
        """This rank's microbatches of step `first` (counted from 0) and of all that follow, without end."""
        while True:
            epoch, skipped = divmod(first, self.steps_per_epoch)
            order = self._order(epoch)[skipped:, self.slots.start : self.slots.stop]
            # a whole step at once: few kernels, and a GPU's queue stays full
            for batch in self.sources["train"].batches(order.flatten(), self.size * len(self.slots)):
                yield self._microbatches(epoch, self._smaller(first), *batch)
                first += 1

    def image_size(self, step: int) -> tuple[int, int]:
        """(height, width) of the training images of a step, counted from 0."""
        height, width, _ = self.manifest.image_shape
        smaller = self._smaller(step)
        return (smaller.size, smaller.size) if smaller else (height, width)

    def _smaller(self, step: int) -> Smaller | None:
        there = (s for s in self.config.smaller if step < s.until_epoch * self.steps_per_epoch)
        return next(there, None)

    def evaluated(self) -> list[tuple[str, str]]:
        """What there is to evaluate on: the name of its figures and the split."""
        return [("test", "test"), *([("val", "holdout")] if self.config.holdout else [])]

    def evaluation(self, split: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """This rank's share of `test`, `holdout` or `train`: each batch's place in the split, and (images, labels)
        like a Microbatch's, not augmented. The split is cut into the same batches on any number of ranks, and each
        is on exactly one of them."""
        source = self.sources["test" if split == "test" else "train"]
        size = self.config.eval_batch
        chunks = self.indices[split].split(size)
        mine = chunks[self.ranks.rank :: self.ranks.world_size]
        if mine:
            first = self.ranks.rank * size
            for images, labels, _ in source.batches(torch.cat(mine), size):
                yield slice(first, first + len(labels)), self._normalised(images), labels
                first += self.ranks.world_size * size

    def pixels(self, split: str, positions: Tensor) -> Tensor:
        """The images at some places of a split as they are: (n, H, W, C) uint8, on the CPU."""
        source = self.sources["test" if split == "test" else "train"]
        wanted = self.indices[split][positions]
        return next(source.batches(wanted, len(wanted)))[0].to("cpu", copy=True)

    def sample_indices(self, step: int, slot: int) -> list[int]:
        """Indices in the training set of the images in one microbatch of a step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        found: list[int] = self._order(epoch)[within, slot].tolist()
        return found

    def sample(self, count: int) -> Tensor:
        """The first `count` training images, normalised, on the CPU: the same on every rank."""
        images, _, _ = next(self.sources["train"].batches(self.indices["train"][:count], count))
        return self._normalised(images).cpu()

    def _order(self, epoch: int) -> Tensor:
        """Indices of an epoch: (steps, microbatches, size)."""
        train = self.indices["train"]
        order = train[permutation(len(train), derive(self.seed, "order", epoch))]
        return order[: self.steps_per_epoch * self.batch_size].view(self.steps_per_epoch, -1, self.size)

    def _microbatches(
        self, epoch: int, smaller: Smaller | None, images: Tensor, labels: Tensor, indices: Tensor
    ) -> list[Microbatch]:
        images = augment(self.config, images, indices, self.seed, epoch)
        images = self._normalised(resize(images, smaller) if smaller else images)
        if self.config.cutout:
            bits = sample_bits(indices, derive(self.seed, "cutout", epoch))
            images = cut_out(images, bits, self.config.cutout)
        parts = zip(*(whole.split(self.size) for whole in (images, labels, indices)), strict=True)
        return [Microbatch(slot, *part) for slot, part in zip(self.slots, parts, strict=True)]

    def _normalised(self, images: Tensor) -> Tensor:
        # whole rows at a time: broadcasting over three channels would be 40 times as slow on a CPU
        width = images.shape[2]
        rows = images.flatten(2).to(torch.float32, copy=True)
        rows.mul_(self.scale.repeat(width)).add_(self.shift.repeat(width))
        return rows.view(images.shape).permute(0, 3, 1, 2)
