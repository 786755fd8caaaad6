"""The optimizers, their groups and their schedule."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from dist_train.config.settings import Block, Convolution, Group, ModelConfig, OptimConfig, Stem
from dist_train.model.network import BlockNetwork, parameter_kind
from dist_train.training.optimizers import Muon, Optimizers, factor, orthogonalise


def network() -> BlockNetwork:
    block = Block(channels=4, convolutions=[Convolution(), Convolution(kernel=1)])
    return BlockNetwork(ModelConfig(blocks=[block], stem=Stem(kind="conv", channels=4)), (3, 8, 8), 5)


def test_schedule() -> None:
    linear = OptimConfig(schedule="linear", warmup=0.2)
    assert [factor(linear, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    cosine = OptimConfig(schedule="cosine")
    assert [factor(cosine, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    constant = OptimConfig(schedule="constant")
    assert [factor(constant, p) for p in (0.0, 0.9)] == [1, 1]


def test_groups_take_what_they_do_not_say_from_the_default() -> None:
    config = OptimConfig(
        default=Group(algorithm="sgd", lr=0.5, momentum=0.8),
        kernels=Group(algorithm="muon", lr=0.1),
        stem=Group(until=0.5),
        schedule="linear",
    )
    optimizers = Optimizers(network(), config, total_steps=40)
    groups = {group["kind"]: (type(o), group) for o in optimizers.all for group in o.param_groups}
    assert set(groups) == {"kernels", "norms", "mixing", "output", "stem"}
    assert groups["kernels"][0] is Muon
    assert groups["norms"][0] is torch.optim.SGD
    assert groups["kernels"][1]["momentum"] == groups["output"][1]["momentum"] == 0.8
    assert optimizers.set_rates(10) == pytest.approx(0.1 * 0.75)
    assert groups["output"][1]["lr"] == pytest.approx(0.5 * 0.75)
    assert groups["stem"][1]["lr"] == pytest.approx(0.5 * 0.5)  # half of its steps are over
    optimizers.set_rates(30)
    assert groups["stem"][1]["lr"] == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 50), (2, 50, 4), (3, 6, 20)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonalise(matrices / matrices.norm(dim=(1, 2), keepdim=True), iterations=6).double()
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4
    assert values.max() < 1.4


SHAPES = [(6, 2, 3, 3), (4, 8, 1, 1), (6, 2, 3, 3), (3, 4, 3, 3), (4, 8, 1, 1)]


def test_muon_keeps_the_norm_and_moves_along_the_orthogonalised_momentum() -> None:
    torch.manual_seed(0)
    kernels = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for kernel in kernels[::2]:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    optimizer = Muon(kernels, lr=0.1, momentum=0.5)
    expected, momenta = ([kernel.detach().clone() * factor for kernel in kernels] for factor in (1, 0))
    for _ in range(2):
        for kernel, weight, momentum in zip(kernels, expected, momenta, strict=True):
            kernel.grad = torch.randn(kernel.shape)
            momentum.mul_(0.5).add_(kernel.grad)
            # rows are output channels; the order of the columns does not matter
            matrix = (kernel.grad + 0.5 * momentum).permute(0, 2, 3, 1).flatten(1)
            update = orthogonalise((matrix / matrix.norm())[None])[0].float()
            update = update.view(len(kernel), *kernel.shape[2:], -1).permute(0, 3, 1, 2)
            weight.mul_(len(weight) ** 0.5 / weight.norm()).sub_(update, alpha=0.1)
        optimizer.step()
        for kernel, weight in zip(kernels, expected, strict=True):
            torch.testing.assert_close(kernel.detach(), weight)


def test_kernels_of_one_shape_do_not_depend_on_each_other() -> None:
    torch.manual_seed(0)
    weights, gradients = torch.randn(3, 8, 4, 3, 3), torch.randn(3, 8, 4, 3, 3)

    def updated(chosen: list[int]) -> list[torch.Tensor]:
        kernels = [torch.nn.Parameter(weights[i].clone()) for i in chosen]
        for kernel, i in zip(kernels, chosen, strict=True):
            kernel.grad = gradients[i].clone()
        Muon(kernels, lr=0.1, momentum=0.5).step()
        return [kernel.detach() for kernel in kernels]

    together = updated([0, 1, 2])
    for i, alone in enumerate(updated([i])[0] for i in range(3)):
        torch.testing.assert_close(together[i], alone)
    gradients[1] = torch.nan
    assert torch.equal(updated([0, 1, 2])[0], together[0])


def test_saved_state_resumes_exactly() -> None:
    config = OptimConfig(default=Group(algorithm="adamw", lr=0.01), kernels=Group(algorithm="muon", lr=0.1))
    torch.manual_seed(0)
    first, second = network(), network()
    second.load_state_dict(first.state_dict())
    optimizers = [Optimizers(model, config, 10) for model in (first, second)]
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(which: int, number: int) -> None:
        model = (first, second)[which]
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers[which].set_rates(number)
        optimizers[which].step(scaler)

    for number in range(3):
        step(0, number)
    second.load_state_dict(first.state_dict())
    optimizers[1].load(copy.deepcopy(optimizers[0].state()))
    for number in range(3, 5):
        step(0, number)
        step(1, number)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_gradient_norm_is_that_of_all_gradients_without_the_scale(scale: float | None) -> None:
    torch.manual_seed(0)
    model = network()
    optimizers = Optimizers(model, OptimConfig(), 10)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    optimizers.set_rates(1)
    loss = sum((p * torch.arange(p.numel(), dtype=p.dtype).view(p.shape)).sum() for p in model.parameters())
    scaler.scale(loss).backward()  # type: ignore[arg-type]
    expected = math.sqrt(sum(k**2 for p in model.parameters() for k in range(p.numel())))
    assert optimizers.step(scaler).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("where", ["kernels", "output"])
def test_an_overflow_anywhere_skips_the_whole_step(where: str) -> None:
    model = network()
    config = OptimConfig(default=Group(algorithm="sgd", lr=0.5), kernels=Group(algorithm="muon", lr=0.1))
    optimizers = Optimizers(model, config, 10)
    optimizers.set_rates(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    before = copy.deepcopy(model.state_dict())

    def step(overflows: bool) -> list[bool]:
        """Whether each parameter changes."""
        for name, parameter in model.named_parameters():
            parameter.grad = torch.ones_like(parameter)
            if overflows and parameter_kind(name, parameter) == where:
                parameter.grad[(0,) * parameter.ndim] = torch.inf
        optimizers.step(scaler)
        return [not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()]

    assert not any(step(overflows=True))
    assert scaler.get_scale() == 2
    assert all(step(overflows=False))
    assert scaler.get_scale() == 2
