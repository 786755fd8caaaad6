"""From betons to microbatches on the device: which samples, in which order, with which augmentation.

`resident` decodes a whole set once onto the device; `stream` reads through ffcv's Loader and serves sets that
do not fit. Both give the same indices and the same augmented pixels, because ffcv only decodes: order and
augmentation are computed here, from the seed, the epoch and the sample's index alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

import data_prep
from dist_train.distributed import Ranks
from dist_train.errors import UserError
from dist_train.randomness import derive, permutation, sample_bits, uniform_integers

NonNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class DataConfig:
    """dir: folder of the betons, `data/DATASET` when empty. holdout: training images kept as a validation
    split. flip: mirror images never, at random, or every other epoch starting at random per image (Jordan 2024,
    "94% on CIFAR-10 in 3.29 seconds", 3.6). translate: largest shift in pixels, the border reflected. cutout:
    side of the square set to the mean. eval_batch: images in one forward pass of evaluation."""

    dataset: str = "cifar10"
    dir: str = ""
    loader: Literal["resident", "stream"] = "resident"
    holdout: NonNegative = 0
    flip: Literal["none", "random", "alternate"] = "alternate"
    translate: NonNegative = 2
    cutout: NonNegative = 0
    eval_batch: Annotated[int, Field(gt=0)] = 500

    @property
    def folder(self) -> Path:
        return Path(self.dir or f"data/{self.dataset}")


@plain_dataclass(frozen=True)
class Microbatch:
    """images: (n, C, H, W) float32, normalised, channels_last; labels and indices: (n,) int64; all on the
    device. slot: its place in the global batch."""

    slot: int
    images: Tensor
    labels: Tensor
    indices: Tensor


def manifest(config: DataConfig) -> data_prep.Manifest:
    """Check the betons and return their manifest. Raises UserError or data_prep.DataError."""
    if not config.folder.exists():
        raise UserError(
            f"data.dir = {config.folder}: there is no such folder; write the data set with "
            f"python -m data_prep --dataset {config.dataset} --out {config.folder}"
        )
    found = data_prep.check(config.folder)
    if found.dataset != config.dataset:
        raise UserError(
            f"data.dir = {config.folder} holds {found.dataset}, but data.dataset = {config.dataset}; "
            f"name the right folder or data set"
        )
    return found


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
        if batch_size % microbatches:
            raise UserError(
                f"train.batch_size = {batch_size} does not split into train.microbatches = {microbatches} "
                f"equal parts; use {batch_size // microbatches * microbatches or microbatches}"
            )
        count = manifest.splits["train"].count
        if config.holdout + batch_size > count:
            raise UserError(
                f"data.holdout = {config.holdout} and train.batch_size = {batch_size} need more than the "
                f"{count} training images of {manifest.dataset}; lower one of them"
            )
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
            batches = self.sources["train"].batches(order.flatten(), self.size)
            for _ in range(len(order)):
                yield [self._microbatch(slot, epoch, *next(batches)) for slot in self.slots]
            first += len(order)

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of `test` or `holdout`, as (images, labels) like a Microbatch's. The split is cut
        into the same batches on any number of ranks, and each is on exactly one of them."""
        source = self.sources["test" if split == "test" else "train"]
        chunks = self.indices[split].split(self.config.eval_batch)
        mine = chunks[self.ranks.rank :: self.ranks.world_size]
        if mine:
            for images, labels, _ in source.batches(torch.cat(mine), self.config.eval_batch):
                yield self._normalised(images), labels

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

    def _microbatch(self, slot: int, epoch: int, images: Tensor, labels: Tensor, indices: Tensor) -> Microbatch:
        images = self._normalised(augment(self.config, images, indices, self.seed, epoch))
        if self.config.cutout:
            bits = sample_bits(indices, derive(self.seed, "cutout", epoch))
            images = _cut_out(images, bits, self.config.cutout)
        return Microbatch(slot, images, labels, indices)

    def _normalised(self, images: Tensor) -> Tensor:
        return (images * self.scale + self.shift).permute(0, 3, 1, 2)


def augment(config: DataConfig, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
    """Mirror and shift images, each by random numbers of its own sample index and the epoch.

    images: (n, H, W, C) uint8. indices: (n,) int64. Returns the shape and dtype of `images`.
    """
    _, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device).expand(len(images), -1)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if config.flip != "none":
        every = config.flip == "alternate"
        mirrored = sample_bits(indices, derive(seed, "flip", *(() if every else (epoch,)))) & 1
        if every:
            mirrored = (mirrored + epoch) & 1
        columns = torch.where(mirrored[:, None] == 1, width - 1 - columns, columns)
    if config.translate:
        bits = sample_bits(indices, derive(seed, "translate", epoch))
        across = uniform_integers(bits, 2 * config.translate + 1) - config.translate
        down = uniform_integers(bits >> 32, 2 * config.translate + 1) - config.translate
        rows = _reflected(rows + down[:, None], height)
        columns = _reflected(columns + across[:, None], width)
    if config.flip == "none" and not config.translate:
        return images
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images[sample, rows[:, :, None], columns[:, None, :]]


def _reflected(positions: Tensor, size: int) -> Tensor:
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def _cut_out(images: Tensor, bits: Tensor, side: int) -> Tensor:
    """Set a square around a random pixel to 0, the mean of normalised images (DeVries and Taylor 2017)."""
    mask = torch.ones((), dtype=torch.bool, device=images.device)
    for dimension, word in ((2, bits), (3, bits >> 32)):
        size = images.shape[dimension]
        first = uniform_integers(word, size) - side // 2
        positions = torch.arange(size, device=images.device)
        inside = (positions >= first[:, None]) & (positions < first[:, None] + side)
        mask = mask & (inside[:, :, None] if dimension == 2 else inside[:, None, :])
    return images.masked_fill_(mask[:, None], 0.0)


class _Resident:
    """A whole split on the device."""

    def __init__(self, config: DataConfig, split: str, device: torch.device) -> None:
        images, labels = data_prep.read_split(config.folder, split)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, indices) in the order of `indices`, `size` at a time."""
        for chosen in indices.to(self.images.device).split(size):
            yield self.images[chosen], self.labels[chosen], chosen


class _Stream:
    """A split read through ffcv's Loader, which only decodes."""

    def __init__(self, config: DataConfig, split: str, device: torch.device) -> None:
        self.file, manifest = data_prep.check_tables(config.folder, split)
        self.count, self.device = manifest.splits[split].count, device
        self.loaders: dict[int, Any] = {}

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, indices) in the order of `indices`, `size` at a time. The images lie in a buffer
        of ffcv that is filled anew: they are valid until the next ones are asked for."""
        if size not in self.loaders:
            self.loaders[size] = self._loader(size)
        loader = self.loaders[size]
        order: NDArray[np.uint64] = indices.numpy().astype(np.uint64)
        # ffcv's sequential order is the given indices; set anew for every epoch it spares a compilation
        loader.indices = loader.traversal_order.indices = loader.first_traversal_order = order
        for chosen, (images, labels) in zip(indices.split(size), loader, strict=True):
            yield images.to(self.device), labels[:, 0].to(self.device, copy=True), chosen.to(self.device)

    @data_prep.keeping_torch_threads()
    def _loader(self, size: int) -> Any:
        from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor

        # ffcv sets torch's threads to its own, also while it runs, so it must have the same number
        workers = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        return Loader(
            str(self.file),
            batch_size=size,
            num_workers=workers,
            seed=0,  # unused by this order, but none would draw from numpy's generator
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            indices=np.arange(self.count, dtype=np.uint64),
            pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
        )
