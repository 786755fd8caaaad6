"""Exact evaluation: every image counted once, on any number of ranks."""

from __future__ import annotations

import math
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
from dist_train.data_prep.images import as_png
from dist_train.distributed.ranks import Ranks, sum_integers
from dist_train.errors import NotFiniteError
from dist_train.model.network import MixedBlock
from dist_train.model.tta import averaged

_BINS = 15  # confidence bins of the calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks")
_WRONG = 40  # misclassified images that evaluation.json shows at most


@dataclass(frozen=True)
class Evaluation:
    """A network's predictions on a split of N images.

    metrics: `loss` (mean cross entropy) and `accuracy` (a fraction), with test-time augmentation also as `*_tta`.
    labels, predicted: (N,) int64. confidence: (N,) float32, the probability of the predicted class. mixing: (N,
    branches of all blocks) float32, the coefficients. branches: names of each block's convolutions. classes: their
    number.
    """

    split: str
    metrics: dict[str, float]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]
    mixing: npt.NDArray[np.float32]
    branches: list[list[str]]
    classes: int

    def coefficients(self) -> list[list[list[float]]]:
        """For each block and branch: [mean, standard deviation] of the mixing coefficient over the images."""
        mean, spread = self.mixing.mean(0, np.float64), self.mixing.std(0, np.float64)
        return self._by_block([[float(m), float(s)] for m, s in zip(mean, spread, strict=True)])

    def confusion(self) -> npt.NDArray[np.int64]:
        """(classes, classes) int64: the number of images of the row's class that were classified as the column's."""
        pairs = self.labels * self.classes + self.predicted
        return np.bincount(pairs, minlength=self.classes**2).reshape(self.classes, self.classes)

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
        counts = np.bincount(self.labels, minlength=self.classes)
        by_class = np.zeros((self.classes, self.mixing.shape[1]))
        np.add.at(by_class, self.labels, self.mixing)
        by_class /= np.maximum(counts, 1)[:, None]
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
                "png": as_png(pixels.numpy()),
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

    Each image's results are gathered from the rank that has it, so the metrics are the same on all ranks and for any
    number of ranks. Leaves the network in training mode. Raises NotFiniteError, on all ranks, when logits or losses are
    not finite.
    """
    model.eval()
    blocks = [block for block in model.modules() if isinstance(block, MixedBlock)]
    branches = [block.branches for block in blocks]
    # columns: label, confidence, predicted class and loss, with TTA the latter two again, and the coefficients; floats
    # by their bits
    starts = {"": 2} if tta == "none" else {"": 2, "_tta": 4}
    columns = 2 + 2 * len(starts) + sum(map(len, branches))
    own = torch.zeros(len(data.indices[split]), columns, dtype=torch.int32, device=ranks.device)
    with _mixing(blocks) as coefficients:
        for place, images, labels in data.evaluation(split):
            with autocast:
                plain: Tensor = model(images).float()
                of_plain = coefficients[: len(blocks)]
                logits = [plain]
                if tta != "none":
                    logits.append(averaged(model, images, plain, tta))
            results = [labels, plain.softmax(1).amax(1)]
            for scores in logits:
                results += [scores.argmax(1), F.cross_entropy(scores, labels, reduction="none")]
            results += [a for block in of_plain for a in block.float().unbind(1)]
            own[place] = torch.stack([r.view(torch.int32) if r.is_floating_point() else r.int() for r in results], 1)
            coefficients.clear()
    model.train()
    # each image's row is nonzero on one rank only, so the sum gathers the rows
    rows = sum_integers(ranks, own).cpu().numpy().T.copy()
    floats = rows.view(np.float32)
    labels, predicted, confidence = rows[0].astype(np.int64), rows[2].astype(np.int64), floats[1]
    finite = np.isfinite(floats[[1, *(start + 1 for start in starts.values())]]).all(0)
    if not finite.all():
        raise NotFiniteError(
            f"the logits of {np.count_nonzero(~finite):,} of {len(labels):,} images of the split {split} are not finite"
        )
    metrics: dict[str, float] = {}
    for suffix, start in starts.items():
        # fsum rounds once, so that the mean does not depend on the order
        metrics[f"loss{suffix}"] = math.fsum(floats[start + 1].tolist()) / len(labels)
        metrics[f"accuracy{suffix}"] = float(np.mean(rows[start] == labels))
    mixing = np.ascontiguousarray(floats[2 + 2 * len(starts) :].T)
    return Evaluation(split, metrics, labels, predicted, confidence, mixing, branches, len(data.classes))


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
