"""From betons to microbatches on the device: which samples, in which order, with which augmentation.

`resident` reads a whole set once onto the device; `stream` leaves it in its file, for sets that do not fit, and reads
it through ffcv's Loader, or without ffcv from a memory map. All give the same indices and the same augmented pixels,
because they only read: order and augmentation are computed here, from the seed, the epoch and the sample's index alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train import data_prep
from dist_train.data_prep import ffcv_library
from dist_train.distributed import Ranks
from dist_train.randomness import derive, permutation, sample_bits, uniform_integers
from dist_train.settings import DataConfig, Smaller, check_batch, check_images


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
        source = _Resident if config.loader == "resident" else _Stream
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
        images = self._normalised(_made_smaller(images, smaller) if smaller else images)
        if self.config.cutout:
            bits = sample_bits(indices, derive(self.seed, "cutout", epoch))
            images = _cut_out(images, bits, self.config.cutout)
        parts = zip(*(whole.split(self.size) for whole in (images, labels, indices)), strict=True)
        return [Microbatch(slot, *part) for slot, part in zip(self.slots, parts, strict=True)]

    def _normalised(self, images: Tensor) -> Tensor:
        # whole rows at a time: broadcasting over three channels would be 40 times as slow on a CPU
        width = images.shape[2]
        rows = images.flatten(2).to(torch.float32, copy=True)
        rows.mul_(self.scale.repeat(width)).add_(self.shift.repeat(width))
        return rows.view(images.shape).permute(0, 3, 1, 2)


def augment(config: DataConfig, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
    """Mirror and shift images, each by random numbers of its own sample index and the epoch.

    images: (n, H, W, C) uint8. indices: (n,) int64. Returns the shape and dtype of `images`.
    """
    if config.flip == "none" and not config.translate:
        return images
    count, height, width, channels = images.shape
    reach = config.translate
    mirrored = across = down = torch.zeros_like(indices)
    if config.flip != "none":
        every = config.flip == "alternate"
        mirrored = sample_bits(indices, derive(seed, "flip", *(() if every else (epoch,)))) & 1
        if every:
            mirrored = (mirrored + epoch) & 1
    if reach:
        bits = sample_bits(indices, derive(seed, "translate", epoch))
        across = uniform_integers(bits, 2 * reach + 1) - reach
        down = uniform_integers(bits >> 32, 2 * reach + 1) - reach
    # a row, its mirror image and the reflected borders of both in one long row: any `width` adjacent pixels of it
    # are a shifted row, and copying them is all there is to do
    flipped = images.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # the order of dimensions that is fast on a CPU
    border = flipped[:, :, width - 1 - reach : width - 1]
    long = torch.cat((border, images, flipped[:, :, 1:], images[:, :, 1 : reach + 1]), 2)
    sample = torch.arange(count, device=images.device)[:, None]
    rows = _reflected(torch.arange(height, device=images.device) + down[:, None], height)
    columns = reach + torch.where(mirrored == 1, width - 1 - across, across)
    first = (sample * height + rows) * long.shape[2] + columns[:, None]
    windows = long.flatten().unfold(0, width * channels, channels)
    return windows.index_select(0, first.flatten()).view(images.shape)


def _made_smaller(images: Tensor, smaller: Smaller) -> Tensor:
    """(n, H, W, C) uint8 images to (n, size, size, C): uint8 when cropped, float32 when scaled, where each pixel is
    an average over those that it covers."""
    size = smaller.size
    if smaller.how == "crop":
        top, left = ((n - size) // 2 for n in images.shape[1:3])
        return images[:, top : top + size, left : left + size]
    nchw = images.permute(0, 3, 1, 2).float()
    return F.interpolate(nchw, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _reflected(positions: Tensor, size: int) -> Tensor:
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def _cut_out(images: Tensor, bits: Tensor, side: int) -> Tensor:
    """Set a square around a random pixel to 0, the mean of normalised images (DeVries and Taylor 2017)."""
    _, channels, height, width = images.shape

    def outside(word: Tensor, size: int) -> Tensor:
        first = uniform_integers(word, size)[:, None] - side // 2
        positions = torch.arange(size, device=images.device)
        return ((positions < first) | (positions >= first + side)).int().neg()

    # as bits, and whole rows at a time: filling by a mask would be 4 times as slow on a CPU
    rows, columns = outside(bits, height), outside(bits >> 32, width).repeat_interleave(channels, 1)
    pixels = images.permute(0, 2, 3, 1).view(len(images), height, -1)
    pixels.view(torch.int32).bitwise_and_(rows[:, :, None] | columns[:, None, :])
    return images


class _Resident:
    """A whole split on the device."""

    def __init__(self, config: DataConfig, split: str, device: torch.device) -> None:
        images, labels = data_prep.read_split(config.folder, split)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, indices) in the order of `indices`, `size` at a time."""
        for chosen in indices.to(self.images.device).split(size):
            yield self.images.index_select(0, chosen), self.labels.index_select(0, chosen), chosen


class _Stream:
    """A split that stays in its file, read through ffcv where it is installed."""

    def __init__(self, config: DataConfig, split: str, device: torch.device) -> None:
        self.file, self.device = data_prep.open_split(config.folder, split), device
        self.labels = torch.from_numpy(self.file.labels).to(device)
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, indices) in the order of `indices`, `size` at a time. The images may lie in a buffer that
        is filled anew: they are valid until the next ones are asked for."""
        with closing(self._reader.batches(indices.numpy(), size)) as images:  # ends its thread
            for chosen, some in zip(indices.to(self.device).split(size), images, strict=True):
                yield self._on_device(torch.from_numpy(some)), self.labels.index_select(0, chosen), chosen

    def _on_device(self, images: Tensor) -> Tensor:
        if self.copying is None:
            return images
        with torch.cuda.stream(self.copying):  # in the current stream it would wait for all kernels before it
            copied = images.to(self.device)
        copied.record_stream(torch.cuda.current_stream(self.device))
        return copied

    @cached_property
    def _reader(self) -> data_prep.BetonFile | ffcv_library.Stream:
        """Built when it is first used: ffcv takes seconds."""
        return ffcv_library.Stream(self.file.path, self.file.shape) if ffcv_library.version() else self.file
