"""Test-time augmentation: the views of an image whose logits are averaged."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from dist_train.config.settings import Tta


def views(images: Tensor, tta: Tta) -> Iterator[tuple[float, Tensor]]:
    """The weights, which sum to 1, and the views of (N, C, H, W) images whose logits are averaged."""
    centre = 0.5 if tta == "mirror" else 0.25
    yield centre, images
    yield centre, images.flip(3)
    if tta == "shift":
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), "reflect")
        for start in (0, 2):
            shifted = padded[:, :, start : start + height, start : start + width]
            yield 0.125, shifted
            yield 0.125, shifted.flip(3)
