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


def cut_out(images: Tensor, bits: Tensor, side: int, colour: Tensor) -> Tensor:
    """Set a square at a random place inside each image to a colour (cutout, DeVries and Taylor 2017; inside as in
    Jordan 2024, airbench96).

    images: (n, H, W, C) uint8. bits: (n,) int64, random. side: of the square in pixels, at most that of the images.
    colour: (C,) uint8. Returns images of the same shape and dtype.
    """
    _, height, width, channels = images.shape

    def inside(word: Tensor, size: int) -> Tensor:
        """(n, size) uint8: all bits set at the positions inside the square, none outside."""
        first = uniform_integers(word, size - side + 1)[:, None]
        positions = torch.arange(size, device=images.device)
        return ((positions >= first) & (positions < first + side)).byte() * 255

    # on the bits of whole rows, which a CPU does faster than a selection of bytes
    rows, columns = inside(bits, height), inside(bits >> 32, width).repeat_interleave(channels, 1)
    pixels = images.flatten(2)
    change = pixels ^ colour.repeat(width)
    change &= rows[:, :, None]
    change &= columns[:, None, :]
    change ^= pixels
    return change.view(images.shape)
