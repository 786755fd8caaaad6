"""Exact evaluation: every image counted once, on any number of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.data import Data
from dist_train.distributed import Ranks, sum_integers

_UNIT = 2.0**-24  # losses are added as whole numbers of this, so that the order of adding is of no matter


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, ranks: Ranks, autocast: torch.autocast) -> dict[str, float]:
    """Mean cross entropy and accuracy (a fraction) as `test_loss` and `test_accuracy`, and likewise `val_*` over
    the held-out training images where there are any.

    The sums are integers and all-reduced, so the result is the same on all ranks and for any number of them.
    Leaves the network in training mode.
    """
    model.eval()
    found = {}
    for name, split in (("test", "test"), ("val", "holdout")):
        if not len(data.indices[split]):
            continue
        totals = torch.zeros(3, dtype=torch.int64, device=ranks.device)
        for images, labels in data.evaluation(split):
            with autocast:
                logits: Tensor = model(images)
            losses = F.cross_entropy(logits.float(), labels, reduction="none").double().clamp(max=1e4)
            correct = (logits.argmax(1) == labels).sum()
            totals += torch.stack(((losses / _UNIT).round().long().sum(), correct, correct.new_tensor(len(labels))))
        loss, right, count = sum_integers(ranks, totals).tolist()
        found[f"{name}_loss"], found[f"{name}_accuracy"] = loss * _UNIT / count, right / count
    model.train()
    return found
