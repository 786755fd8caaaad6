"""The block network against its formula, written as plain loops in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from dist_train.config.settings import BatchNormConfig, Block, Convolution, ModelConfig, Output, Stem, Where
from dist_train.errors import UserError
from dist_train.model.mixing import exporting
from dist_train.model.network import BatchNorm, BlockNetwork, MixedBlock, parameter_kind, whiten
from dist_train.model.shapes import flops, shapes, training_flops

Array = NDArray[np.float64]


def convolved(x: Array, weight: Array, bias: Array | None, conv: Convolution, padding: int) -> Array:
    """A convolution as its definition says, one output number at a time."""
    images, channels, height, width = x.shape
    outputs, per_group, kernel, _ = weight.shape
    padded = np.zeros((images, channels, height + 2 * padding, width + 2 * padding))
    padded[:, :, padding : padding + height, padding : padding + width] = x
    reach = conv.dilation * (conv.kernel - 1) + 1
    rows = (height + 2 * padding - reach) // conv.stride + 1
    columns = (width + 2 * padding - reach) // conv.stride + 1
    result = np.zeros((images, outputs, rows, columns))
    for n, o, r, c in itertools.product(range(images), range(outputs), range(rows), range(columns)):
        first = o // (outputs // conv.groups) * per_group
        total = 0.0 if bias is None else bias[o]
        for i, u, v in itertools.product(range(per_group), range(kernel), range(kernel)):
            row, column = r * conv.stride + u * conv.dilation, c * conv.stride + v * conv.dilation
            total += weight[o, i, u, v] * padded[n, first + i, row, column]
        result[n, o, r, c] = total
    return result


def activated(x: Array, name: str) -> Array:
    if name == "relu":
        x = np.maximum(x, 0)
    elif name == "gelu":
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    elif name == "silu":
        x = x / (1 + np.exp(-x))
    return x


def normalised(x: Array, eps: float) -> Array:
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    result: Array = (x - mean) / np.sqrt(var + eps)
    return result


def coefficients(x: Array, block: MixedBlock) -> Array:
    if block.config.per_image:
        fc = block.mixing.fc
        a: Array = x.mean((2, 3)) @ fc.weight.detach().numpy().T + fc.bias.detach().numpy()
    else:
        a = np.tile(block.mixing.bias.detach().numpy(), (len(x), 1))
    if block.config.coefficients == "softmax":
        e = np.exp(a / block.config.temperature)
        a = e / e.sum(1, keepdims=True)
    elif block.config.coefficients == "sigmoid":
        a = 1 / (1 + np.exp(-a))
    return a


def formula(x: Array, block: MixedBlock) -> Array:
    """x' = a1*C1(x) + ... + aL*CL(x), with norm, activation and pooling where the configuration puts them."""
    config = block.config
    a = coefficients(x, block)
    total: Any = 0.0
    for position, (conv, module) in enumerate(zip(config.convolutions, block.convolutions, strict=True)):
        assert isinstance(module, torch.nn.Conv2d)
        bias = None if module.bias is None else module.bias.detach().numpy()
        z = convolved(x, module.weight.detach().numpy(), bias, conv, int(module.padding[0]))
        if config.norm == "branch":
            z = normalised(z, 1e-5)
        if config.activate == "branch":
            z = activated(z, config.activation)
        total = total + a[:, position, None, None, None] * z
    if config.pool_at == "sum":
        total = pooled(total, config)
    if config.norm == "post":
        total = normalised(total, 1e-5)
    if config.activate == "post":
        total = activated(total, config.activation)
    return pooled(total, config) if config.pool_at == "end" else total


def pooled(x: Array, config: Block) -> Array:
    size = config.pool
    rows, columns = x.shape[2] // size, x.shape[3] // size
    result = np.zeros((*x.shape[:2], rows, columns))
    for r, c in itertools.product(range(rows), range(columns)):
        window = x[:, :, r * size : (r + 1) * size, c * size : (c + 1) * size]
        result[:, :, r, c] = window.max((2, 3)) if config.pool_kind == "max" else window.mean((2, 3))
    return result


@st.composite
def blocks(draw: st.DrawFn) -> tuple[int, int, Block]:
    """(input channels, image size, block) for any block whose convolutions agree on a shape."""
    channels, outputs = draw(st.sampled_from([(2, 4), (4, 2), (3, 3), (4, 8)]))
    size = draw(st.integers(6, 8))
    stride = draw(st.sampled_from([1, 1, 2]))
    convolutions = []
    for _ in range(draw(st.integers(1, 3))):
        kernel, dilation = draw(st.sampled_from([(1, 1), (3, 1), (3, 2), (5, 1)]))
        divisors = [g for g in range(1, channels + 1) if channels % g == 0 and outputs % g == 0]
        groups, bias = draw(st.sampled_from(divisors)), draw(st.booleans())
        convolutions.append(Convolution(kernel=kernel, dilation=dilation, stride=stride, groups=groups, bias=bias))
    places: list[Where] = ["branch", "post", "none"]
    where = st.sampled_from(places)
    block = Block(
        channels=outputs,
        convolutions=convolutions,
        norm=draw(where),
        activate=draw(where),
        activation=draw(st.sampled_from(["relu", "gelu", "silu", "identity"])),
        coefficients=draw(st.sampled_from(["raw", "softmax", "sigmoid"])),
        temperature=draw(st.sampled_from([0.5, 1.0, 3.0])),
        pool=draw(st.sampled_from([1, 2])),
        pool_kind=draw(st.sampled_from(["max", "avg"])),
        pool_at=draw(st.sampled_from(["sum", "end"])),
        per_image=draw(st.sampled_from([True, True, False])),
    )
    return channels, size, block


def built(channels: int, block: Block, seed: int = 0) -> MixedBlock:
    torch.manual_seed(seed)
    module = MixedBlock(channels, block, BatchNormConfig()).double()
    for parameter in module.mixing.parameters():  # weights start at zero, where the average would not matter
        torch.nn.init.normal_(parameter)
    return module


@settings(max_examples=40, deadline=None)
@given(blocks())
def test_block_is_the_formula(case: tuple[int, int, Block]) -> None:
    channels, size, config = case
    block = built(channels, config)
    x = torch.randn(3, channels, size, size, dtype=torch.float64)
    expected = formula(x.numpy(), block)
    found = block(x).detach().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(blocks(), st.integers(0, 2**31))
def test_block_gradients_are_the_formulas(case: tuple[int, int, Block], seed: int) -> None:
    channels, size, config = case
    block = built(channels, config, seed)
    x = torch.randn(2, channels, size, size, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(block(x)).detach()
    (block(x) * direction).sum().backward()
    generator = np.random.default_rng(seed)

    def along() -> float:
        return float((formula(x.detach().numpy(), block) * direction.numpy()).sum())

    for tensor in (x, *block.parameters()):
        if tensor.grad is None:  # the scale and bias of no norm
            continue
        if tensor.ndim == 1 and any(tensor is p for norm in block.norms for p in norm.parameters()):
            continue  # the formula above has no learned scale; test_batch_norm_* covers it
        where = tuple(int(generator.integers(n)) for n in tensor.shape)
        step, value = 1e-6, float(tensor.data[where])
        tensor.data[where] = value + step
        above = along()
        tensor.data[where] = value - step
        below = along()
        tensor.data[where] = value
        slope = (above - below) / (2 * step)
        assert float(tensor.grad[where]) == pytest.approx(slope, rel=2e-4, abs=2e-4)


def simple(**fields: Any) -> Block:
    return Block(**{"channels": 4, "convolutions": [Convolution(), Convolution(kernel=1)], **fields})


def test_network_output_block_is_averages_through_the_hidden_layers() -> None:
    config = ModelConfig(blocks=[simple(norm="none", pool=2)], output=Output(hidden=[7, 5], activation="relu"))
    network = BlockNetwork(config, (3, 8, 8), classes=6).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    first = network.blocks[0]
    assert isinstance(first, MixedBlock)
    h = torch.from_numpy(formula(x.numpy(), first)).mean((2, 3))
    for layer in network.output.hidden:
        h = F.relu(layer(h))
    torch.testing.assert_close(network(x), network.output.logits(h))
    assert network(x).shape == (2, 6)


def test_batch_norm_is_torchs_in_both_modes() -> None:
    mine, peer = BatchNorm(4, BatchNormConfig()), torch.nn.BatchNorm2d(4)
    x = 2 * torch.randn(5, 4, 3, 3) + 1
    torch.testing.assert_close(mine(x), peer(x))
    mine.mean.copy_(peer.running_mean)  # type: ignore[arg-type]
    mine.var.copy_(peer.running_var)  # type: ignore[arg-type]
    torch.testing.assert_close(mine.eval()(x), peer.eval()(x))


def test_dirac_kernels_pass_their_input_on() -> None:
    config = ModelConfig(
        blocks=[simple(norm="none", activate="none", convolutions=[Convolution(), Convolution(kernel=1)])],
        init="dirac",
    )
    network = BlockNetwork(config, (3, 6, 6), 2)
    x = torch.randn(2, 3, 6, 6)
    # L copies at coefficients of 1 / sqrt(L)
    torch.testing.assert_close(network.blocks[0](x)[:, :3], x * math.sqrt(2))


def test_whitened_patches_are_uncorrelated() -> None:
    stem = torch.nn.Conv2d(3, 24, 2)
    images = torch.randn(64, 3, 8, 8).cumsum(2).cumsum(3)
    whiten(stem, images, eps=0.0)
    out = F.conv2d(images.double(), stem.weight.double())[:, :12].transpose(0, 1).flatten(1)
    covariance = (out @ out.T / out.shape[1]).detach()
    torch.testing.assert_close(covariance, torch.eye(12, dtype=torch.float64), rtol=0.02, atol=0.02)
    torch.testing.assert_close(stem.weight[12:], -stem.weight[:12])


def counted_flops(network: BlockNetwork, image_shape: tuple[int, int, int], stem_learns: bool = True) -> int:
    """Operations of the convolutions and matrix products of one image's forward and backward pass, as they run."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, *image_shape), stem_learns).sum().backward()
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("directions", [1, 4])
def test_whitening_has_no_kernels_of_directions_without_variance(directions: int) -> None:
    """Grey images vary in four directions, images of one grey level each in one."""
    stem = torch.nn.Conv2d(3, 24, 2)
    grey = torch.randn(40, 1, 9 if directions == 4 else 1, 9 if directions == 4 else 1).expand(-1, 3, 9, 9)
    whiten(stem, grey, eps=0.0)
    out = F.conv2d(grey, stem.weight)
    torch.testing.assert_close((out**2).mean((0, 2, 3)), torch.ones(24), rtol=1e-3, atol=1e-3)
    assert torch.linalg.matrix_rank(stem.weight.detach().flatten(1), rtol=1e-3) == directions


def test_whitening_of_images_of_one_colour_is_refused() -> None:
    with pytest.raises(UserError, match="all of one colour"):
        whiten(torch.nn.Conv2d(3, 24, 2), torch.zeros(10, 3, 8, 8))


@pytest.mark.parametrize("kind", ["none", "conv", "whiten"])
@pytest.mark.parametrize("learns", [True, False])
def test_training_flops_are_those_that_run(kind: Any, learns: bool) -> None:
    config = ModelConfig(blocks=[simple(), simple()], stem=Stem(kind=kind))
    network = BlockNetwork(config, (3, 9, 9), 10)
    assert counted_flops(network, (3, 9, 9), learns) == training_flops(config, (3, 9, 9), 10, learns)


def test_a_stem_that_learns_no_more_leaves_every_other_gradient_as_it_was() -> None:
    config = ModelConfig(blocks=[simple(), simple()], stem=Stem(kind="conv"))
    network = BlockNetwork(config, (3, 9, 9), 10)
    images = torch.randn(4, 3, 9, 9)
    network(images).square().sum().backward()
    before = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    network(images, stem_learns=False).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None
        assert before[name] is not None
        expected = torch.zeros_like(p) if name.startswith("stem.") else before[name]
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=0)


def test_pooling_all_takes_images_of_any_size() -> None:
    blocks = [simple(pool="all", pool_at="sum", channels=6)]
    network = BlockNetwork(ModelConfig(blocks=blocks), (3, 9, 9), 10).eval()
    assert shapes(ModelConfig(blocks=blocks), (3, 9, 9))[-1] == (6, 1, 1)
    for size in (5, 8):
        assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_shapes_flops_and_parameter_kinds() -> None:
    config = ModelConfig(
        blocks=[
            simple(pool=2),
            simple(
                channels=6, convolutions=[Convolution(padding=0), Convolution(dilation=2, padding=1)], per_image=False
            ),
        ],
        stem=Stem(kind="conv", channels=4, kernel=3, padding=1),
        output=Output(hidden=[5]),
    )
    assert shapes(config, (3, 16, 16)) == [(4, 16, 16), (4, 8, 8), (6, 6, 6)]
    network = BlockNetwork(config, (3, 16, 16), 10)
    macs = 16 * 16 * (27 * 4 + 36 * 4 + 4 * 4) + 36 * (36 * 6 + 36 * 6) + 2 * 4 + 6 * 5 + 5 * 10
    assert sum(map(sum, flops(config, (3, 16, 16), 10))) == 2 * macs
    assert counted_flops(network, (3, 16, 16)) == training_flops(config, (3, 16, 16), 10, True)
    kinds = {name: parameter_kind(name, p) for name, p in network.named_parameters()}
    assert kinds["stem.bias"] == "stem"
    assert kinds["blocks.0.mixing.fc.weight"] == "mixing"
    assert kinds["blocks.1.mixing.bias"] == "mixing"
    assert kinds["blocks.1.convolutions.0.weight"] == "kernels"
    assert kinds["blocks.1.norms.0.bias"] == "norms"
    assert kinds["output.hidden.0.weight"] == "output"


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([simple(), simple(convolutions=[Convolution(), Convolution(padding=0)])], "block 2, convolution 2"),
        ([simple(convolutions=[Convolution(), Convolution(groups=2)])], "block 1, convolution 2: groups = 2"),
        ([simple(convolutions=[Convolution(kernel=2)])], "block 1, convolution 1: padding"),
        ([simple(convolutions=[Convolution(kernel=11, padding=0)])], "block 1, convolution 1: kernel = 11"),
        ([simple(pool=16)], "block 1: pool = 16"),
    ],
)
def test_impossible_architectures_are_refused_by_name(blocks: list[Block], words: str) -> None:
    with pytest.raises(UserError, match=words):
        shapes(ModelConfig(blocks=blocks), (3, 8, 8))


def test_compiled_code_is_not_taken_for_exported_code() -> None:
    """torch 2.11 and earlier versions say that code which they compile is exported."""
    compiled = torch.compile(lambda x: x + exporting(), backend="eager")
    assert compiled(torch.zeros(1)).item() == 0
    torch.export.export(Asking(), (torch.zeros(1),))
    assert Asking.answers[-1]
    assert not exporting()


class Asking(torch.nn.Module):
    """Asks whether it is exported."""

    answers: ClassVar[list[bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.answers.append(exporting())
        return x + 1
