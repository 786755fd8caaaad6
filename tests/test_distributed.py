"""The fixed-order sum and the environment of a rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_train.distributed import FixedOrderSum, Ranks, allowed_world_sizes, launched_as, ranks, tree_sum
from dist_train.errors import UserError


def by_hand(parts: list[Tensor]) -> Tensor:
    """The tree, written as its definition: the left half plus the right half."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return by_hand(parts[:middle]) + by_hand(parts[middle:])


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 2**31))
def test_tree_sum_of_contiguous_shares_is_the_whole_tree(levels: int, seed: int) -> None:
    count = 2**levels
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(7, generator=generator) * 10.0 ** (i % 5) for i in range(count)]
    whole = tree_sum(leaves)
    assert torch.equal(whole, by_hand(leaves))
    for world_size in allowed_world_sizes(count):
        shares = [Ranks(r, world_size, r, torch.device("cpu")).share(count) for r in range(world_size)]
        assert [i for share in shares for i in share] == list(range(count))
        assert torch.equal(tree_sum([tree_sum([leaves[i] for i in share]) for share in shares]), whole)


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_gradients_of_one_rank_are_the_tree_over_its_microbatches(microbatches: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 1), nn.Flatten(), nn.Linear(2 * 36, 3))
    model.to(memory_format=torch.channels_last)
    with ranks("cpu", threads=1, deterministic=True, timeout=60) as here:
        summed = FixedOrderSum(here, model, microbatches)
        for _ in range(3):  # DDP lays its buckets out anew after the first
            inputs = [torch.randn(4, 3, 8, 8) for _ in range(microbatches)]
            expected = []
            for parameter_index in range(len(list(model.parameters()))):
                leaves = []
                for x in inputs:
                    model.zero_grad(set_to_none=True)
                    model(x).square().sum().backward()
                    grad = list(model.parameters())[parameter_index].grad
                    assert grad is not None
                    leaves.append(grad.clone())
                expected.append(by_hand(leaves))
            for index, x in enumerate(inputs):
                with summed.leaf(index):
                    summed.ddp(x).square().sum().backward()
            for parameter, total in zip(model.parameters(), expected, strict=True):
                assert parameter.grad is not None
                assert torch.equal(parameter.grad, total)
    torch.use_deterministic_algorithms(False)


def test_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name in values:
        monkeypatch.delenv(name, raising=False)
    assert launched_as() == (0, 1, 0)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == (3, 4, 1)
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(UserError, match="whole numbers"):
        launched_as()
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="but not MASTER_PORT"):
        launched_as()
