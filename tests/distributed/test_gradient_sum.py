"""The fixed-order sum: the same tree over the microbatches on any number of ranks."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import run_ranks
from torch import Tensor, nn

from dist_train.distributed.gradient_sum import FixedOrderSum, Subtrees, cost, pieces
from dist_train.distributed.ranks import gather_shares, join_ranks, share


def by_hand(parts: list[Tensor]) -> Tensor:
    """The tree, written as its definition: the largest power of two of them, plus the rest."""
    if len(parts) == 1:
        return parts[0]
    left = 1 << ((len(parts) - 1).bit_length() - 1)
    return by_hand(parts[:left]) + by_hand(parts[left:])


def random_leaves(count: int, size: int, seed: int) -> list[Tensor]:
    """Numbers of very different magnitudes, whose sum depends on the order in which they are added."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * 10.0 ** (i % 5) for i in range(count)]


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_subtrees_of_any_contiguous_shares_make_the_whole_tree(count: int, data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, count))
    leaves = random_leaves(count, 5, data.draw(st.integers(0, 2**31)))
    shares = [share(count, rank, world_size) for rank in range(world_size)]
    assert [i for one in shares for i in one] == list(range(count))
    assert {len(one) for one in shares} <= {count // world_size, -(-count // world_size)}
    whole: Subtrees[Tensor] = Subtrees(count, torch.add)
    for one in shares:
        mine: Subtrees[Tensor] = Subtrees(count, torch.add)
        for leaf in one:
            mine.push(0, leaf, leaves[leaf])
        assert [(level, index) for level, index, _ in mine.nodes] == pieces(one, count)
        for node in mine.nodes:
            whole.push(*node)
    ((level, index, total),) = whole.nodes
    assert (level, index) == ((count - 1).bit_length(), 0)
    assert torch.equal(total, by_hand(leaves))


def test_the_order_matters_in_these_tests() -> None:
    leaves = random_leaves(8, 1000, 0)
    assert not torch.equal(by_hand(leaves), torch.stack(leaves).sum(0))


class Given(nn.Module):
    """A network whose gradient is what it is given."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.all = nn.ParameterList(
            nn.Parameter(torch.zeros(shape).contiguous(memory_format=torch.channels_last))
            if len(shape) == 4
            else nn.Parameter(torch.zeros(shape))
            for shape in shapes
        )

    def forward(self, gradient: Tensor) -> Tensor:
        parts = gradient.split([p.numel() for p in self.all])
        loss: Tensor = sum(
            ((p * part.view_as(p)).sum() for p, part in zip(self.all, parts, strict=True)), torch.zeros(())
        )
        return loss


def draw_case(seed: int, most_ranks: int) -> tuple[int, list[tuple[int, ...]]]:
    """A number of microbatches and some parameter shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    shapes = [tuple(draw(1, 7) for _ in range(draw(1, 4))) for _ in range(draw(1, 9))]
    if seed % 3 == 0:  # more than DDP's first bucket of 1 MiB, so that there are several
        shapes += [(300, 1000), (37, 11, 3, 3), (300, 999)]
    return draw(most_ranks, 2 * most_ranks + 3), shapes


def sums_of_cases(seeds: list[int]) -> list[str]:
    """Reduce the gradients of every case in two steps; returns digests of the sums."""
    found = []
    with join_ranks("cpu", threads=1, deterministic=True, timeout=60) as here:
        for seed in seeds:
            microbatches, shapes = draw_case(seed, here.world_size)
            model = Given(shapes)
            size = sum(math.prod(shape) for shape in shapes)
            summed = FixedOrderSum(here, model, microbatches)
            mine = here.share(microbatches)
            for step in range(2):  # DDP lays its buckets out anew after the first
                leaves = random_leaves(microbatches, size, seed + step)
                for index, slot in enumerate(mine):
                    with summed.microbatch(index) as gradient:
                        summed.wrap()(leaves[slot]).backward()
                    assert gradient.largest == leaves[slot].abs().max()
                expected = by_hand(leaves).split([p.numel() for p in model.all])
                for parameter, total in zip(model.all, expected, strict=True):
                    assert parameter.grad is not None
                    assert torch.equal(parameter.grad, total.view_as(parameter)), f"case {seed}, step {step}"
            rows = torch.arange(2 * microbatches).view(-1, 2)
            gathered = gather_shares(here, rows[mine.start : mine.stop], microbatches)
            assert torch.equal(gathered, rows)
            sums = torch.cat([parameter.grad.flatten() for parameter in model.all if parameter.grad is not None])
            found.append(hashlib.sha256(sums.numpy().tobytes()).hexdigest())
    return found


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_ranks_sum_random_gradients_like_one_process(world_size: int) -> None:
    answers = run_ranks(world_size, sums_of_cases, list(range(10 * world_size, 10 * world_size + 7)))
    assert [answer.error for answer in answers] == [""] * world_size
    assert answers[0].value
    assert all(answer.value == answers[0].value for answer in answers)


@pytest.mark.parametrize("microbatches", [1, 2, 8, 11])
def test_gradients_of_one_rank_are_the_tree_over_its_microbatches(microbatches: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 1), nn.Flatten(), nn.Linear(2 * 36, 3))
    model.to(memory_format=torch.channels_last)
    with join_ranks("cpu", threads=1, deterministic=True, timeout=60) as here:
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
                with summed.microbatch(index):
                    summed.wrap()(x).square().sum().backward()
            for parameter, total in zip(model.parameters(), expected, strict=True):
                assert parameter.grad is not None
                assert torch.equal(parameter.grad, total)
    torch.use_deterministic_algorithms(False)


def test_a_gradient_that_is_not_finite_shows_in_its_own_microbatch() -> None:
    with join_ranks("cpu", threads=1, deterministic=True, timeout=60) as here:
        summed = FixedOrderSum(here, Given([(3,), (2, 2)]), 3)
        for index, value in enumerate((1.0, math.nan, -math.inf)):
            with summed.microbatch(index) as gradient:
                summed.wrap()(torch.full((7,), value)).backward()
            assert str(float(gradient.largest)) == ("1.0", "nan", "inf")[index]
    torch.use_deterministic_algorithms(False)


def test_the_formula_of_the_cost() -> None:
    elements = 1_000_000
    for world_size in (1, 2, 4, 8, 64, 1024):
        ring = 2 * 4 * (world_size - 1) * -(-elements // world_size)  # bytes a rank sends in a ring all-reduce
        found = cost(elements, microbatches=world_size, world_size=world_size)
        assert (found.sent, found.received) == (ring, ring)
        assert cost(elements, 1024, world_size).sent == ring  # as many, whenever the shares are whole branches
    assert cost(elements, 8, 3).sent == 3 * 2 * 4 * -(-elements // 3)  # two branches for some ranks
    assert cost(elements, 8, 1).memory == 3 * 4 * elements  # sums of 4, 2 and 1 microbatches wait for the last
