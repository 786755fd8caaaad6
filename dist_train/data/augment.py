"""Augmentation of training images, with random numbers that depend on seed, epoch and sample index alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.config.settings import DataConfig, Smaller
from dist_train.randomness import derive, sample_bits, uniform_integers


def augment(config: DataConfig, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
    """Mirror and shift images, each by random numbers of its own sample index and the epoch.

    The alternating flip is that of Jordan 2024, "94% on CIFAR-10 in 3.29 seconds", 3.6. images: (n, H, W, C) uint8.
    indices: (n,) int64, in the training set. Returns images of the same shape and dtype.
    """
    if config.flip == "none" and not config.translate:
        return images
    count, height, width, channels = images.shape
    max_shift = config.translate
    mirrored = across = down = torch.zeros_like(indices)
    if config.flip != "none":
        alternate = config.flip == "alternate"
        mirrored = sample_bits(indices, derive(seed, "flip", *(() if alternate else (epoch,)))) & 1
        if alternate:
            mirrored = (mirrored + epoch) & 1
    if max_shift:
        bits = sample_bits(indices, derive(seed, "translate", epoch))
        across = uniform_integers(bits, 2 * max_shift + 1) - max_shift
        down = uniform_integers(bits >> 32, 2 * max_shift + 1) - max_shift
    # Concatenate each row, its mirror image and the reflected borders of both. Every shifted or mirrored row is then a
    # window of `width` adjacent pixels, so that one copy does both.
    flipped = images.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # on a CPU faster than flip(2)
    border = flipped[:, :, width - 1 - max_shift : width - 1]
    extended = torch.cat((border, images, flipped[:, :, 1:], images[:, :, 1 : max_shift + 1]), 2)
    sample = torch.arange(count, device=images.device)[:, None]
    rows = _reflected(torch.arange(height, device=images.device) + down[:, None], height)
    columns = max_shift + torch.where(mirrored == 1, width - 1 - across, across)
    first = (sample * height + rows) * extended.shape[2] + columns[:, None]
    windows = extended.flatten().unfold(0, width * channels, channels)
    return windows.index_select(0, first.flatten()).view(images.shape)


def resize(images: Tensor, smaller: Smaller) -> Tensor:
    """Resize (n, H, W, C) uint8 images to (n, size, size, C) (progressive resizing, Howard 2018): uint8 when cropped,
    float32 when scaled, by antialiased bilinear interpolation."""
    size = smaller.size
    if smaller.how == "crop":
        top, left = ((n - size) // 2 for n in images.shape[1:3])
        return images[:, top : top + size, left : left + size]
    nchw = images.permute(0, 3, 1, 2).float()
    return F.interpolate(nchw, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _reflected(positions: Tensor, size: int) -> Tensor:
    """Positions outside 0..size-1, reflected at the borders."""
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def cut_out(images: Tensor, bits: Tensor, side: int) -> Tensor:
    """Set a square around a random pixel to 0, the mean of normalised images (cutout, DeVries and Taylor 2017).

    images: (n, C, H, W) float32, channels_last. bits: (n,) int64, random. side: of the square in pixels; the part of it
    outside the image is dropped. Works in place, and returns `images`.
    """
    _, channels, height, width = images.shape

    def outside(word: Tensor, size: int) -> Tensor:
        """(n, size) int32: all bits set at the positions outside the square, none inside."""
        first = uniform_integers(word, size)[:, None] - side // 2
        positions = torch.arange(size, device=images.device)
        return ((positions < first) | (positions >= first + side)).int().neg()

    # AND of the float32 bits, on whole rows: masked_fill would take 4 times as long on a CPU
    rows, columns = outside(bits, height), outside(bits >> 32, width).repeat_interleave(channels, 1)
    pixels = images.permute(0, 2, 3, 1).view(len(images), height, -1)
    pixels.view(torch.int32).bitwise_and_(rows[:, :, None] | columns[:, None, :])
    return images
