"""Exact evaluation: every image counted once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from dist_train.data import Data
from dist_train.distributed import Ranks, sum_integers

_UNIT = 2.0**-24  # losses are added as whole numbers of this, so that the order of adding is of no matter

Tta = Literal["none", "mirror", "shift"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class EvaluateConfig:
    """tta: test-time augmentation of the last evaluation, whose figures come beside those without it. `mirror`
    averages the logits of an image and its mirror image; `shift` does so for the image (half of the weight) and for
    it shifted by one pixel up and left and down and right (a quarter each; Jordan 2024, "94% on CIFAR-10 in 3.29
    seconds", 3.5). every: epochs from one evaluation to the next; the last epoch has one in any case."""

    tta: Tta = "none"
    every: Annotated[int, Field(gt=0)] = 1


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, ranks: Ranks, autocast: torch.autocast, tta: Tta = "none"
) -> dict[str, float]:
    """Mean cross entropy and accuracy (a fraction) as `test_loss` and `test_accuracy`, and likewise `val_*` over
    the held-out training images where there are any; with test-time augmentation also as `*_tta`.

    The sums are integers and all-reduced, so the result is the same on all ranks and for any number of them.
    Leaves the network in training mode.
    """
    model.eval()
    found = {}
    for name, split in (("test", "test"), ("val", "holdout")):
        if not len(data.indices[split]):
            continue
        totals = torch.zeros(2, 3, dtype=torch.int64, device=ranks.device)
        for images, labels in data.evaluation(split):
            with autocast:
                plain: Tensor = model(images).float()
                logits = [plain]
                if tta != "none":
                    views = list(_views(images, tta))  # the first is the image itself
                    logits.append(sum((w * model(v).float() for w, v in views[1:]), views[0][0] * plain))
            for row, scores in zip(totals, logits, strict=False):
                row += _counts(scores, labels)
        for suffix, (loss, right, count) in zip(("", "_tta"), sum_integers(ranks, totals).tolist(), strict=True):
            if count:
                found[f"{name}_loss{suffix}"] = loss * _UNIT / count
                found[f"{name}_accuracy{suffix}"] = right / count
    model.train()
    return found


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(summed loss in units, number right, number) of a batch, int64."""
    losses = F.cross_entropy(logits, labels, reduction="none").double().clamp(max=1e4)
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack(((losses / _UNIT).round().long().sum(), correct, correct.new_tensor(len(labels))))


def _views(images: Tensor, tta: Tta) -> Iterator[tuple[float, Tensor]]:
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
