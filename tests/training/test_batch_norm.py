"""The measured statistics of the BatchNorms, and the comparison of training and evaluation mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dist_train import config
from dist_train.config.settings import DataConfig, TrainConfig
from dist_train.data.batches import Data
from dist_train.data.dataset import manifest
from dist_train.distributed.ranks import Ranks
from dist_train.errors import NotFiniteError
from dist_train.model.network import BatchNorm, BlockNetwork
from dist_train.training.batch_norm import accuracy_by_mode, measure_statistics
from dist_train.training.selection import Selection

OFF = torch.autocast("cpu", enabled=False)
ALONE = Ranks(0, 1, torch.device("cpu"), torch.device("cpu"))


def loaded(digits: Path, eval_batch: int = 500, microbatches: int = 4) -> Data:
    settings = DataConfig(dataset="digits", dir=str(digits), eval_batch=eval_batch)
    return Data(settings, TrainConfig(batch_size=256, microbatches=microbatches), manifest(settings), ALONE)


def all_of(data: Data, network: BlockNetwork) -> Selection:
    return Selection(TrainConfig(), data, network, None)


@pytest.fixture
def network() -> BlockNetwork:
    torch.manual_seed(0)
    return BlockNetwork(config.load("digits", None, []).model, (3, 32, 32), 10)


def test_statistics_are_those_of_the_same_training_images_in_batches(digits: Path, network: BlockNetwork) -> None:
    data = loaded(digits, eval_batch=300)
    batches = [images for images, *_ in data.statistics()]
    assert [len(images) for images in batches] == [250] * 4  # of at most 300, of equal size
    assert len(data.indices["statistics"].unique()) == 1000
    first = next(module for module in network.modules() if isinstance(module, BatchNorm))
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().double()))
    measure_statistics(network, all_of(data, network), ALONE, OFF, 0)
    expected = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(first.mean.double(), expected, rtol=1e-4, atol=1e-5)
    expected = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(first.var.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(module.training for module in network.modules())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    measure_statistics(network, all_of(data, network), ALONE, OFF, 0)  # they depend on nothing that was measured before
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_in_one_batch_evaluation_is_training(digits: Path, network: BlockNetwork) -> None:
    data = loaded(digits, eval_batch=1000, microbatches=1)
    ((images, *_),) = data.statistics()
    measure_statistics(network, all_of(data, network), ALONE, OFF, 0)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), network.train()(images), rtol=1e-3, atol=1e-4)


def test_modes_are_compared_on_the_same_images(digits: Path, network: BlockNetwork) -> None:
    data = loaded(digits)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _, (batch, *_) in zip(range(12), data.steps(0), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(network(batch.images), batch.labels).backward()
        optimizer.step()
    measure_statistics(network, all_of(data, network), ALONE, OFF, 0)
    training, evaluation, images = accuracy_by_mode(network, all_of(data, network), ALONE, OFF, 0)
    assert images == 1000
    assert min(training, evaluation) > 0.5
    assert abs(training - evaluation) < 0.05
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.mean += 3 * module.var.sqrt()
    still, broken, _ = accuracy_by_mode(network, all_of(data, network), ALONE, OFF, 0)
    assert still == training
    assert broken < training - 0.2


def test_weights_and_statistics_must_be_finite(digits: Path, network: BlockNetwork) -> None:
    network.output.logits.bias.data[3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"^1 of the network's 21 tensors are not finite \(output.logits.bias is"):
        measure_statistics(network, all_of(loaded(digits), network), ALONE, OFF, 0)
