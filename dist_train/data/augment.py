"""Augmentation of training images, by random numbers of the sample's index and the epoch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.config.settings import DataConfig, Smaller
from dist_train.randomness import derive, sample_bits, uniform_integers


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


def resize(images: Tensor, smaller: Smaller) -> Tensor:
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


def cut_out(images: Tensor, bits: Tensor, side: int) -> Tensor:
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
