"""Exact evaluation: every image counted once, on any number of ranks."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.settings import Tta
from dist_train.data.batches import Evaluated
from dist_train.distributed.ranks import Ranks, sum_integers
from dist_train.model.network import MixedBlock
from dist_train.model.tta import averaged

_UNIT = 2.0**-24  # losses and coefficients are summed as multiples of this: integer sums do not depend on the order
_LARGEST = 1e3  # coefficients are clamped to this magnitude, so that a batch's sums of squares are exact in float64
_BINS = 15  # confidence bins of the calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks")
_WRONG = 40  # misclassified images that evaluation.json shows at most


@dataclass(frozen=True)
class Evaluation:
    """A network's predictions on a split of N images.

    metrics: `loss` (mean cross entropy) and `accuracy` (a fraction), with test-time augmentation also as `*_tta`.
    labels, predicted: (N,) int64. confidence: (N,) float32, the probability of the predicted class. sums: int64
    (2, classes, branches of all blocks), the coefficients and their squares summed by label, in units of 2^-24.
    branches: names of each block's convolutions.
    """

    split: str
    metrics: dict[str, float]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]
    sums: npt.NDArray[np.int64]
    branches: list[list[str]]

    def coefficients(self) -> list[list[list[float]]]:
        """For each block and branch: [mean, standard deviation] of the mixing coefficient over the images."""
        mean, square = self.sums.sum(1).astype(np.float64) * _UNIT / len(self.labels)
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        return self._by_block([[float(m), float(s)] for m, s in zip(mean, spread, strict=True)])

    def confusion(self) -> npt.NDArray[np.int64]:
        """(classes, classes) int64: the number of images of the row's class that were classified as the column's."""
        classes = self.sums.shape[1]
        return np.bincount(self.labels * classes + self.predicted, minlength=classes**2).reshape(classes, classes)

    def calibration(self) -> dict[str, Any]:
        """`ece`, the expected calibration error (Guo et al. 2017), and `bins` of equal width: their `count`, mean
        `confidence` and `accuracy`."""
        which = np.minimum((self.confidence * _BINS).astype(np.int64), _BINS - 1)
        right, confidence = self.labels == self.predicted, self.confidence.astype(np.float64)
        bins: list[dict[str, float | None]] = []
        error = 0.0
        for number in range(_BINS):
            inside = which == number
            content: dict[str, float | None] = {"from": number / _BINS, "count": int(inside.sum())}
            if content["count"]:
                mean, rate = float(confidence[inside].mean()), float(right[inside].mean())
                error += abs(mean - rate) * float(inside.sum())
                content |= {"confidence": mean, "accuracy": rate}
            bins.append({"confidence": None, "accuracy": None, **content})
        return {"ece": error / len(self.labels), "bins": bins}

    def details(self, data: Evaluated, step: int) -> dict[str, Any]:
        """The content of `evaluation.json`, described in `dist_train.runs.metrics`. step: finished steps."""
        counts = np.bincount(self.labels, minlength=self.sums.shape[1])
        by_class = self.sums[0] * _UNIT / np.maximum(counts, 1)[:, None]  # (classes, branches)
        of_classes = zip(*map(self._by_block, by_class.tolist()), strict=True)
        return {
            "dataset": data.dataset,
            "split": self.split,
            "step": step,
            "images": len(self.labels),
            **self.metrics,
            "classes": list(data.classes),
            "confusion": self.confusion().tolist(),
            "calibration": self.calibration(),
            "coefficients": [
                {
                    "branches": names,
                    "mean": [mean for mean, _ in statistics],
                    "std": [std for _, std in statistics],
                    "by_class": list(classes),
                }
                for names, statistics, classes in zip(self.branches, self.coefficients(), of_classes, strict=True)
            ],
            "wrong": self._wrong(data),
        }

    def _wrong(self, data: Evaluated) -> list[dict[str, Any]]:
        """The misclassified images of the highest confidence."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        chosen = torch.from_numpy(wrong[np.argsort(-self.confidence[wrong], kind="stable")][:_WRONG])
        if not len(chosen):
            return []
        return [
            {
                "index": int(data.indices[self.split][position]),
                "label": int(self.labels[position]),
                "predicted": int(self.predicted[position]),
                "confidence": float(self.confidence[position]),
                "png": _png(pixels.numpy()),
            }
            for position, pixels in zip(chosen, data.pixels(self.split, chosen), strict=True)
        ]

    def _by_block(self, values: list[Any]) -> list[list[Any]]:
        """Split a list with one value for each branch of all blocks into one list for each block."""
        remaining = iter(values)
        return [[next(remaining) for _ in names] for names in self.branches]


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Evaluated, split: str, ranks: Ranks, autocast: torch.autocast, tta: Tta = "none"
) -> Evaluation:
    """Evaluate on the split `test`, `holdout` or `train`, without augmentation except `tta`.

    Only integers are summed over images and ranks, so the result is the same on all ranks and for any number of ranks.
    Leaves the network in training mode.
    """
    model.eval()
    blocks = [block for block in model.modules() if isinstance(block, MixedBlock)]
    classes, branches = len(data.classes), sum(len(block.convolutions) for block in blocks)
    totals = torch.zeros(2, 3, dtype=torch.int64, device=ranks.device)
    answers = torch.zeros(len(data.indices[split]), 3, dtype=torch.int64, device=ranks.device)
    sums = torch.zeros(2, classes, branches, dtype=torch.int64, device=ranks.device)
    with _mixing(blocks) as coefficients:
        for place, images, labels in data.evaluation(split):
            with autocast:
                plain: Tensor = model(images).float()
                of_plain = coefficients[: len(blocks)]
                logits = [plain]
                if tta != "none":
                    logits.append(averaged(model, images, plain, tta))
            if blocks:
                a = torch.cat(of_plain, 1).double().clamp(-_LARGEST, _LARGEST)
                of_class = F.one_hot(labels, classes).double().T
                sums += torch.stack([of_class @ (value / _UNIT).round() for value in (a, a**2)]).long()
            coefficients.clear()
            for row, scores in zip(totals, logits, strict=False):
                row += _counts(scores, labels)
            confidence, predicted = plain.softmax(1).max(1)
            answers[place] = torch.stack((labels, predicted, confidence.view(torch.int32)), 1)
    model.train()
    metrics: dict[str, float] = {}
    for suffix, (loss, right, count) in zip(("", "_tta"), sum_integers(ranks, totals).tolist(), strict=True):
        if count:
            metrics |= {f"loss{suffix}": loss * _UNIT / count, f"accuracy{suffix}": right / count}
    # each image's row is nonzero on one rank only, so the sum gathers the rows
    label, predicted, confidence = sum_integers(ranks, answers).cpu().T.contiguous()
    return Evaluation(
        split,
        metrics,
        label.numpy(),
        predicted.numpy(),
        confidence.int().view(torch.float32).numpy(),
        sum_integers(ranks, sums).cpu().numpy(),
        [block.branches for block in blocks],
    )


@contextmanager
def _mixing(blocks: list[MixedBlock]) -> Iterator[list[Tensor]]:
    """A list to which every forward pass appends each block's mixing coefficients, (N, branches) float32."""
    seen: list[Tensor] = []
    hooks = [block.mixing.register_forward_hook(lambda _, __, output: seen.append(output)) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    """An (H, W, 3) image as PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(summed loss in units of 2^-24, correct images, images) of a batch: (3,) int64. logits: (n, classes) float32."""
    losses = F.cross_entropy(logits, labels, reduction="none").double().clamp(max=1e4)
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack(((losses / _UNIT).round().long().sum(), correct, correct.new_tensor(len(labels))))
