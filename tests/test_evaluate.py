"""Accuracies and losses against their definition, in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.data import Data, DataConfig, manifest
from dist_train.distributed import Ranks
from dist_train.evaluate import Tta, evaluate


def scores(network: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Logits as the option's words say, view by view."""

    def mirrored(x: Tensor) -> Tensor:
        half: Tensor = 0.5 * network(x) + 0.5 * network(x.flip(3))
        return half

    if tta == "none":
        plain: Tensor = network(images)
        return plain
    if tta == "mirror":
        return mirrored(images)
    height, width = images.shape[2:]
    up_left, down_right = torch.empty_like(images), torch.empty_like(images)
    for row in range(height):
        for column in range(width):
            # pixels of the neighbour; beyond the border those on the other side of it
            up_left[:, :, row, column] = images[:, :, abs(row - 1), abs(column - 1)]
            below, right = (n - 1 - abs(n - 2 - i) for n, i in ((height, row), (width, column)))
            down_right[:, :, row, column] = images[:, :, below, right]
    return 0.5 * mirrored(images) + 0.25 * mirrored(up_left) + 0.25 * mirrored(down_right)


@pytest.mark.parametrize("tta", ["none", "mirror", "shift"])
def test_figures_with_and_without_test_time_augmentation(digits: Path, tta: Tta) -> None:
    config = DataConfig(dataset="digits", dir=str(digits), holdout=50, eval_batch=77)
    alone = Ranks(0, 1, torch.device("cpu"), torch.device("cpu"))
    data = Data(config, manifest(config), alone, batch_size=256, microbatches=4, seed=0)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    found = evaluate(network, data, alone, torch.autocast("cpu", enabled=False), tta)
    assert network.training
    for name, split in (("test", "test"), ("val", "holdout")):
        batches = list(data.evaluation(split))
        labels = torch.cat([labels for _, labels in batches])
        for suffix in {"", "_tta" if tta != "none" else ""}:
            logits = torch.cat([scores(network, images, tta if suffix else "none").detach() for images, _ in batches])
            assert found[f"{name}_accuracy{suffix}"] == float(np.mean((logits.argmax(1) == labels).numpy()))
            assert found[f"{name}_loss{suffix}"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert any(key.endswith("_tta") for key in found) == (tta != "none")
