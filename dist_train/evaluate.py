"""Exact evaluation: every image counted once, on any number of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.data import Data
from dist_train.distributed import Ranks, sum_integers

_UNIT = 2.0**-24  # losses are added as whole numbers of this, so that the order of adding is of no matter


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, split: str, ranks: Ranks, autocast: torch.autocast) -> tuple[float, float]:
    """Mean cross entropy and accuracy (a fraction) of the network over `test` or `holdout`.

    The sums are integers and all-reduced, so they are equal on all ranks and for any number of them. The
    network is left in the mode it was in.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    for images, labels in data.evaluation(split):
        with autocast:
            logits: Tensor = model(images)
        losses = F.cross_entropy(logits.float(), labels, reduction="none").double().clamp(max=1e4)
        correct = (logits.argmax(1) == labels).sum()
        totals += torch.stack(((losses / _UNIT).round().long().sum(), correct, correct.new_tensor(len(labels))))
    model.train(training)
    loss, correct_count, count = sum_integers(ranks, totals).tolist()
    return loss * _UNIT / count, correct_count / count
