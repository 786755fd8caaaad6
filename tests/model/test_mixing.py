"""The three forms of a mixed convolution against the sum of convolutions as autograd differentiates it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_capture import Capture
from torch import Tensor, nn

from dist_train.model import mixing
from dist_train.model.mixing import Form, average, choose, mix, weighted_sum

FORMS: list[Form] = ["outputs", "inputs", "kernels"]


def convolution(kernel: int = 3, channels: int = 4, outputs: int = 6, **fields: Any) -> nn.Conv2d:
    fields = {"padding": kernel // 2, "bias": False, **fields}
    return nn.Conv2d(channels, outputs, kernel, **fields).to(memory_format=torch.channels_last)


def formula(coefficients: Tensor, x: Tensor, convolutions: list[nn.Conv2d]) -> Tensor:
    weighted = [a[:, None, None, None] * c(x) for a, c in zip(coefficients.unbind(1), convolutions, strict=True)]
    return torch.stack(weighted).sum(0)


def with_gradients(function: Any, coefficients: Tensor, x: Tensor, convolutions: list[nn.Conv2d]) -> list[Tensor]:
    """The output and the gradients of coefficients, x and all parameters, for one fixed gradient of the output."""
    parameters = [p for c in convolutions for p in c.parameters()]
    inputs = [t for t in (coefficients, x, *parameters) if t.requires_grad]
    total = function(coefficients, x, convolutions)
    direction = torch.sin(torch.arange(total.numel(), dtype=torch.float32)).view(total.shape).to(total.dtype)
    return [total, *torch.autograd.grad(total, inputs, direction)]


def inputs(n: int, size: int, branches: int, dtype: torch.dtype, channels: int = 4) -> tuple[Tensor, Tensor]:
    a = torch.randn(n, branches, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    x = torch.randn(n, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return a, x.requires_grad_()


DEPTHWISE = {"kernel": 1, "outputs": 4, "groups": 4}
GEOMETRIES: list[tuple[str, list[dict[str, Any]]]] = [
    ("3x3 and 1x1", [{}, {"kernel": 1}]),
    ("1x1 first, then 3x3, with biases", [{"kernel": 1, "bias": True}, {}, {"bias": True}]),
    ("1x1 only", [{"kernel": 1}, {"kernel": 1, "bias": True}]),
    ("1x1 with padding", [{"kernel": 1, "padding": 1}, {"padding": 2}]),
    ("one", [{}]),
    ("unpadded", [{"padding": 0}, {"padding": 0}, {"padding": 0}]),
    ("padded beyond the reach", [{"padding": 3}, {"padding": 3}]),
    ("dilated", [{"dilation": 2, "padding": 2}, {"dilation": 2, "padding": 2}, {"kernel": 1}]),
    ("sizes", [{"kernel": 5, "padding": 1}, {"padding": 0}, {"kernel": 5, "padding": 1, "bias": True}]),
    ("even sizes", [{"kernel": 4, "padding": 1}, {"kernel": 2, "padding": 0}]),
    ("dilations differ", [{}, {"dilation": 2, "padding": 2}, {"kernel": 1}]),
    ("groups", [{"groups": 2}, {"groups": 2, "bias": True}, {"kernel": 1, "groups": 2}, {}]),
    ("depthwise 1x1", [{"outputs": 4}, DEPTHWISE, {"kernel": 1, "outputs": 4}, {**DEPTHWISE, "bias": True}]),
    ("depthwise 1x1 only", [DEPTHWISE]),
    ("depthwise, but padded or more outputs", [{**DEPTHWISE, "padding": 1}, {"padding": 2, "outputs": 4}]),
    ("strides", [{"stride": 2}, {"kernel": 1, "padding": 0, "stride": 2, "bias": True}, {"kernel": 5, "stride": 2}]),
]
SUMMABLE = 10  # the kernels of so many of these are kernels of one convolution


@pytest.mark.parametrize("last", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("position", "form"), [*itertools.product(range(len(GEOMETRIES)), FORMS)])
def test_every_form_is_the_formula_in_float64(position: int, form: Form, last: torch.memory_format) -> None:
    torch.manual_seed(position)
    convolutions = [convolution(**fields).double() for fields in GEOMETRIES[position][1]]
    a, x = inputs(3, 7, len(convolutions), torch.float64)
    x = x.detach().contiguous(memory_format=last).requires_grad_()
    if form == "kernels" and position >= SUMMABLE:
        with pytest.raises(ValueError, match="cannot be summed"):
            mix(a, x, convolutions, form)
        return
    expected = with_gradients(formula, a, x, convolutions)
    found = with_gradients(lambda a, x, c: mix(a, x, c, form), a, x, convolutions)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(mix(a, x, convolutions, form), expected[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("position", "form"), [(p, f) for f in FORMS for p in range(SUMMABLE if f == "kernels" else len(GEOMETRIES))]
)
def test_every_form_can_be_recorded_as_a_cuda_graph(position: int, form: Form) -> None:
    convolutions = [convolution(**fields) for fields in GEOMETRIES[position][1]]
    a, x = inputs(3, 7, len(convolutions), torch.float32)
    direction = torch.ones_like(mix(a, x, convolutions, form))
    with Capture() as capture, torch.autocast("cpu"):
        for capture.strict in (False, True):
            torch.autograd.grad(mix(a, x, convolutions, form), (a, x), direction)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixing._PART, "cpu", 1)  # image by image
    convolutions = [convolution(3, 2, 2).double(), convolution(1, 2, 2, bias=True).double()]
    a, x = inputs(2, 3, 2, torch.float64, channels=2)
    parameters = [p for c in convolutions for p in c.parameters()]
    assert torch.autograd.gradcheck(lambda a, x, *_: mix(a, x, convolutions, form), (a, x, *parameters), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_an_input_that_needs_no_gradient(form: Form) -> None:
    convolutions = [convolution().double(), convolution(1).double()]
    a, x = inputs(3, 5, 2, torch.float64)
    x = x.detach()
    expected = with_gradients(formula, a, x, convolutions)
    found = with_gradients(lambda a, x, c: mix(a, x, c, form), a, x, convolutions)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_the_formula(form: Form, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    convolutions = [convolution(3, 32, 64), convolution(3, 32, 64, bias=True), convolution(1, 32, 64)]
    if form == "inputs":
        convolutions = [convolution(3, 32, 32), convolution(1, 32, 32, groups=32), convolution(1, 32, 32)]
    a, x = inputs(5, 8, 3, x_dtype, channels=32)

    def in_autocast(a: Tensor, x: Tensor, convolutions: list[nn.Conv2d]) -> Tensor:
        with torch.autocast("cpu", dtype):
            return mix(a, x, convolutions, form)

    found = with_gradients(in_autocast, a, x, convolutions)
    assert found[0].dtype == dtype
    assert [g.dtype for g in found[1:]] == [torch.float32, x_dtype, *[torch.float32] * (len(found) - 3)]
    wide = [convolution.double() for convolution in convolutions]
    a, x = (t.detach().double().requires_grad_() for t in (a, x))
    for one, exact in zip(found, with_gradients(formula, a, x, wide), strict=True):
        assert (one.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (13, 1025), (250, 2304), (7, 61504)])
def test_dot_products_are_those_of_float64(n: int, k: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(k)
    wide = torch.promote_types(dtype, torch.float32)
    x, y = torch.randn(2, n, k).mul(300).to(dtype)  # fp16 does not hold the products
    for rows in (y, x, x[:1].expand(n, k), x[:, :1].expand(n, k), x.t().contiguous().t()):
        found, products = mixing._dot(rows, y, wide), rows.double() * y.double()
        assert found.dtype == wide
        size = products.norm(dim=1) + products.sum(1).abs()
        assert ((found.double() - products.sum(1)).abs() <= tolerance * size).all()
    assert mixing._dot(x, y, torch.float64).dtype == torch.float64
    assert mixing._dot(x[:0], y[:0], wide).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dot_product_is_a_function_of_its_two_rows(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 21, 1023).to(dtype)
    together = mixing._dot(x, y, torch.float32)
    one_by_one = [mixing._dot(x[i : i + 1], y[i : i + 1], torch.float32) for i in range(len(x))]
    assert torch.equal(together, torch.cat(one_by_one))
    for bad in (torch.nan, torch.inf):
        x[4, 7] = bad
        found = mixing._dot(x, y, torch.float32)
        assert not found[4].isfinite()
        found[4] = together[4]
        assert torch.equal(found, together)


def test_dot_products_in_bf16_compiled() -> None:
    x, y = torch.randn(2, 9, 2304).bfloat16()
    compiled = torch.compile(mixing._dot, backend="aot_eager", dynamic=False)
    found, expected = (dot(x, y, torch.float32) for dot in (compiled, mixing._dot))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["outputs", "inputs"])
def test_gradients_of_coefficients_in_bf16_are_those_of_the_rounded_images(form: Form) -> None:
    torch.manual_seed(0)
    a, x = inputs(5, 9, 2, torch.bfloat16, channels=32)
    convolutions = [convolution(1, 32, 32).bfloat16(), convolution(1, 32, 32).bfloat16()]
    for one in convolutions:  # whole powers of two, with one input each: the branches are exact in bf16
        one.weight.data.copy_(
            2.0 ** torch.randint(-2, 3, (32, 1, 1, 1)) * torch.eye(32)[torch.randperm(32), :, None, None]
        )
    total = mix(a, x, convolutions, form)
    direction = torch.randn_like(total)
    (found,) = torch.autograd.grad(total, a, direction)
    products = torch.stack([direction.double() * c(x).double() for c in convolutions], 1).flatten(2)
    assert ((found - products.sum(2)).abs() < 1e-6 * products.norm(dim=2)).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_again(form: Form) -> None:
    convolutions = [convolution(3, 32, 32), convolution(3, 32, 32)]
    a, x = inputs(9, 8, 2, torch.bfloat16, channels=32)

    def in_autocast(a: Tensor, x: Tensor, convolutions: list[nn.Conv2d]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mix(a, x, convolutions, form)

    first, second = (with_gradients(in_autocast, a, x, convolutions) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # torch 2.9's compiler itself does
def test_compiled() -> None:
    convolutions = [convolution(), convolution(1, bias=True)]
    a, x = inputs(3, 5, 2, torch.float32)
    expected = with_gradients(formula, a, x, convolutions)

    def all_forms(a: Tensor, x: Tensor, convolutions: list[nn.Conv2d]) -> Tensor:
        averages, x = average(x, torch.float32)
        coefficients = a + 0 * averages.sum()
        return torch.stack([mix(coefficients, x, convolutions, form) for form in FORMS]).mean(0)

    compiled = torch.compile(all_forms, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(with_gradients(compiled, a, x, convolutions), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-5)]
)
def test_average(dtype: torch.dtype, tolerance: float) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    x = (torch.randn(4, 24, 31, 31) + 1).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    found, same = average(x, wide)
    assert found.dtype == wide
    expected = x.detach().double().mean((2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    by_average, by_image = torch.randn_like(found), torch.randn_like(x)
    (gradient,) = torch.autograd.grad([found, same], x, [by_average, by_image])
    exact = by_image.double() + by_average.double()[:, :, None, None] / 31**2
    torch.testing.assert_close(gradient.double(), exact, rtol=0.004 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


@pytest.mark.parametrize("coefficient_dtype", [torch.float32, torch.float64])
def test_weighted_sum_under_autocast_dtypes(coefficient_dtype: torch.dtype) -> None:
    a = torch.randn(4, 2, dtype=coefficient_dtype, requires_grad=True)
    branches = [torch.randn(4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    total = weighted_sum(a, branches)
    assert total.dtype == torch.bfloat16
    total.float().square().sum().backward()
    exact = [b.detach().double() for b in branches]
    expected = sum(a.detach().double()[:, i, None, None, None] * b for i, b in enumerate(exact))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(total.double(), expected, rtol=0.03, atol=0.03)
    dots = torch.stack([(2 * expected * b).sum((1, 2, 3)) for b in exact], 1)
    assert a.grad is not None
    assert a.grad.dtype == coefficient_dtype
    torch.testing.assert_close(a.grad.double(), dots, rtol=0.03, atol=0.5)


def test_weighted_sum_passes_gradcheck() -> None:
    a = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    branches = [torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, *b: weighted_sum(a, list(b)), (a, *branches))


@pytest.mark.parametrize(
    ("shape", "outputs", "kernels", "cpu", "gpu"),
    [
        ((250, 24, 31, 31), 64, (3, 1), "inputs", "inputs"),
        ((250, 256, 7, 7), 256, (3, 1), "inputs", "inputs"),
        ((250, 256, 7, 7), 64, (3, 1), "outputs", "outputs"),
        ((125, 128, 16, 16), 128, (3, 3, 3), "kernels", "outputs"),
        ((1, 128, 16, 16), 128, (3, 3, 3), "outputs", "outputs"),
    ],
)
def test_choice(shape: tuple[int, ...], outputs: int, kernels: tuple[int, ...], cpu: Form, gpu: Form) -> None:
    with torch.device("meta"):
        convolutions = [nn.Conv2d(shape[1], outputs, kernel, padding=kernel // 2) for kernel in kernels]
    assert choose(shape, convolutions, "cpu") == cpu
    assert choose(shape, convolutions, "cuda") == gpu
    assert choose(shape, convolutions, "cpu", input_gradient=False) != "inputs"


def test_patches_are_unfolds() -> None:
    x = torch.randn(2, 3, 7, 6)
    expected = F.unfold(x, 3, dilation=2, padding=1).unflatten(1, (3, 9)).permute(0, 3, 2, 1).flatten(2)
    torch.testing.assert_close(mixing._patches(x, 3, 1, 2), expected, rtol=0, atol=0)
