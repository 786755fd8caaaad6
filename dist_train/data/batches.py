"""The microbatches of a rank: which samples, in which order, with which augmentation.

The loader `resident` reads a data set once into the device's memory; `stream` leaves it in its file, for sets that do
not fit, and reads it through ffcv's Loader, or without ffcv from a memory map. Order and augmentation are computed in
this module, from the seed, the epoch and the sample's index alone, so both give the same indices and augmented pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train import data_prep
from dist_train.config.settings import DataConfig, Smaller, TrainConfig, steps_in
from dist_train.data.augment import augment, cut_out, resize
from dist_train.data.dataset import check_images
from dist_train.data.loaders import Resident, Stream
from dist_train.distributed.ranks import Ranks
from dist_train.randomness import derive, permutation, sample_bits

# Images for the statistics of the channels, at least. Accuracy saturates at as few (Wu and Johnson 2021, "Rethinking
# 'Batch' in BatchNorm", section 3.2).
_STATISTICS = 1000
_ALIGNMENT = 64  # bytes; that of torch's allocators or less


@dataclass(frozen=True)
class Microbatch:
    """One microbatch, on the device. images: (n, C, H, W) float32, normalised, channels_last. labels, indices: (n,)
    int64. slot: its number in the global batch, counted from 0."""

    slot: int
    images: Tensor
    labels: Tensor
    indices: Tensor


class Evaluated:
    """Labelled images to evaluate on, in splits, and this rank's share of them.

    dataset: a name. classes: their names, in the order of the labels.
    """

    def __init__(
        self,
        dataset: str,
        classes: tuple[str, ...],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        ranks: Ranks,
        eval_batch: int,
        sources: Mapping[str, Resident | Stream],
        indices: dict[str, Tensor],
    ) -> None:
        """mean, std: of each channel, by which images are normalised. eval_batch: images in one forward pass. sources:
        the loaders of `test` and `train`. indices: (n,) int64 of each split, where `holdout` is a part of `train`."""
        self.dataset, self.classes, self.ranks, self.eval_batch = dataset, classes, ranks, eval_batch
        self.sources, self.indices = sources, indices
        means, deviations = (torch.tensor(values, device=ranks.device) for values in (mean, std))
        self.scale, self.shift = 1 / (255 * deviations), -means / deviations

    def evaluation(self, split: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """This rank's batches of the split `test`, `holdout` or `train`: (positions in the split, images, labels), the
        latter two as in Microbatch, not augmented. The split is divided into the same batches for any number of ranks,
        and each batch is on exactly one rank."""
        source = self.sources["train" if split == "holdout" else split]
        size = min(self.eval_batch, len(self.indices[split]))  # ffcv reserves memory for whole batches
        chunks = self.indices[split].split(size)
        own = chunks[self.ranks.rank :: self.ranks.world_size]
        if own:
            first = self.ranks.rank * size
            for images, labels, _ in source.batches(torch.cat(own), size):
                yield slice(first, first + len(labels)), self._normalised(images), labels
                first += self.ranks.world_size * size

    def pixels(self, split: str, positions: Tensor) -> Tensor:
        """The unprocessed images at `positions`, (n,) int64, of a split: (n, H, W, C) uint8, on the CPU."""
        source = self.sources["train" if split == "holdout" else split]
        indices = self.indices[split][positions]
        return next(source.batches(indices, len(indices)))[0].to("cpu", copy=True)

    def _normalised(self, images: Tensor) -> Tensor:
        # scale and shift repeated to whole rows: broadcasting over three channels would take 40 times as long on a CPU
        width = images.shape[2]
        rows = images.flatten(2).to(torch.float32, copy=True)
        rows.mul_(self.scale.repeat(width)).add_(self.shift.repeat(width))
        return rows.view(images.shape).permute(0, 3, 1, 2)


class Data(Evaluated):
    """The training and evaluation batches of one rank. images: in the training set, held-out ones with them.
    steps_per_epoch: of whole batches. total_steps: of the run; the part of an epoch at its end is rounded up to whole
    steps."""

    def __init__(
        self,
        config: DataConfig,
        train: TrainConfig,
        manifest: data_prep.Manifest,
        ranks: Ranks,
    ) -> None:
        """train: has the batches, the seed and the length of the run. Raises UserError when the training set or its
        images are too small for the settings."""
        batch_size, seed = train.batch_size, train.seed
        check_images(config, manifest, batch_size)
        self.images = count = manifest.splits["train"].count
        self.config, self.manifest, self.seed = config, manifest, seed
        self.batch_size, self.size = batch_size, batch_size // train.microbatches
        self.slots = ranks.share(train.microbatches)
        # the seed 0 for every run: runs of all seeds hold out the same images, and can be compared
        shuffled = permutation(count, derive(0, "holdout")) if config.holdout else torch.arange(count)
        indices = {
            "train": shuffled[config.holdout :].sort().values,
            "holdout": shuffled[: config.holdout].sort().values,
            "test": torch.arange(manifest.splits["test"].count),
        }
        # For statistics: training images in batches of equal size, which fit into memory as those of training or
        # evaluation do
        chosen = indices["train"][permutation(len(indices["train"]), derive(seed, "statistics"))]
        # so many that as many are left where only the hardest are used
        chosen = chosen[: math.ceil(max(batch_size, _STATISTICS) / train.select.fraction)]
        self.statistics_batches = -(-len(chosen) // max(self.size, config.eval_batch))
        indices["statistics"] = chosen[: len(chosen) // self.statistics_batches * self.statistics_batches]
        self.steps_per_epoch = len(indices["train"]) // batch_size
        self.total_steps = math.ceil(train.epochs * self.steps_per_epoch)
        self.mean_colour = torch.tensor([round(255 * mean) for mean in manifest.mean]).byte().to(ranks.device)
        sources: dict[str, Resident | Stream] = {}
        for split in ("train", "test"):
            if config.loader == "resident":
                sources[split] = Resident(*data_prep.read_split(config.folder, split), ranks.device)
            else:
                sources[split] = Stream(config, split, ranks.device)
        described = (manifest.dataset, manifest.classes, manifest.mean, manifest.std)
        super().__init__(*described, ranks, config.eval_batch, sources, indices)

    def steps(self, first: int) -> Iterator[list[Microbatch]]:
        """This rank's microbatches of step `first` (counted from 0) and of every later step, without end."""
        while True:
            epoch, skipped = divmod(first, self.steps_per_epoch)
            order = self._order(epoch)[skipped:, self.slots.start : self.slots.stop]
            # augment all microbatches of a step at once: fewer kernel launches on a GPU
            for batch in self.sources["train"].batches(order.flatten(), self.size * len(self.slots)):
                yield self._microbatches(epoch, self._smaller(first), *batch)
                first += 1

    def image_size(self, step: int) -> tuple[int, int]:
        """(height, width) of the training images of a step, counted from 0."""
        height, width, _ = self.manifest.image_shape
        smaller = self._smaller(step)
        return (smaller.size, smaller.size) if smaller else (height, width)

    def _smaller(self, step: int) -> Smaller | None:
        active = (s for s in self.config.smaller if step < steps_in(s.until, self.total_steps))
        return next(active, None)

    def evaluated(self) -> list[tuple[str, str]]:
        """The splits to evaluate on: (prefix of the metrics, split) of each."""
        return [("test", "test"), *([("val", "holdout")] if self.config.holdout else [])]

    def statistics(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, indices), as in Microbatch, of this rank's share of `statistics_batches`: training images as
        in an evaluation, the same ones at every step, for the statistics of the network's channels."""
        batches = self.indices["statistics"].view(self.statistics_batches, -1)
        share = self.ranks.share(self.statistics_batches)
        if share:
            own = batches[share.start : share.stop].flatten()
            for images, labels, indices in self.sources["train"].batches(own, batches.shape[1]):
                yield self._normalised(images), labels, indices

    def sample_indices(self, step: int, slot: int) -> list[int]:
        """Indices in the training set of the images in one microbatch of a step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        indices: list[int] = self._order(epoch)[within, slot].tolist()
        return indices

    def sample(self, count: int) -> Tensor:
        """The first `count` training images, (count, C, H, W) float32, normalised, on the CPU."""
        images, _, _ = next(self.sources["train"].batches(self.indices["train"][:count], count))
        return self._normalised(images).cpu()

    def _order(self, epoch: int) -> Tensor:
        """The training images of an epoch in order: their indices, (steps, microbatches, size) int64."""
        train = self.indices["train"]
        order = train[permutation(len(train), derive(self.seed, "order", epoch))]
        return order[: self.steps_per_epoch * self.batch_size].view(self.steps_per_epoch, -1, self.size)

    def _microbatches(
        self, epoch: int, smaller: Smaller | None, images: Tensor, labels: Tensor, indices: Tensor
    ) -> list[Microbatch]:
        images = augment(self.config, images, indices, self.seed, epoch)
        if self.config.cutout:
            bits = sample_bits(indices, derive(self.seed, "cutout", epoch))
            images = cut_out(images, bits, self.config.cutout, self.mean_colour)
        images = self._normalised(resize(images, smaller) if smaller else images)
        parts = zip(*(whole.split(self.size) for whole in (images, labels, indices)), strict=True)
        return [
            Microbatch(slot, _aligned(part), labels, indices)
            for slot, (part, labels, indices) in zip(self.slots, parts, strict=True)
        ]


def _aligned(part: Tensor) -> Tensor:
    """A part of a batch at an address at which a tensor of its own could be. cuDNN and MKL choose kernels, and so the
    order of sums, by the alignment too: it must not depend on the part's place in the batch of a rank."""
    return part if part.storage_offset() * part.element_size() % _ALIGNMENT == 0 else part.clone()
