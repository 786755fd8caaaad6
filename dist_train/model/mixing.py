"""A block's mixed convolutions: `a1*C1(x) + ... + aL*CL(x)` with coefficients `a` of each image.

This is conditional or dynamic convolution (Yang et al. 2019, "CondConv"; Chen et al. 2020, "Dynamic Convolution"). It
is linear in the images, the coefficients and the kernels, and so can be computed in three forms, which differ only in
rounding:

- `outputs`: L convolutions, then the weighted sum of their outputs;
- `inputs`: the sum of the convolutions of the scaled images a_l * x. It moves fewer bytes where the input is smaller
  than the output, and keeps only x for the backward pass instead of L outputs;
- `kernels`: the kernels are summed first, K_n = sum_l a_l(n) W_l, and every image is convolved once, with its own
  kernel K_n. It needs about 1/L of the operations, but memory traffic for N kernels.

Elementwise passes over images work on flat rows, one for each image: broadcasting over the channels_last axes is up to
twenty times slower on a CPU. All functions in this module can be differentiated once. A graph that torch exports has
the plain formula instead, which works for any batch size, in operations that every runtime has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["outputs", "inputs", "kernels"]


# (stride, padding, dilation, groups, kernel size) of a convolution
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]


# The cost of one pass over an element (read, compute, write), in floating-point operations of a convolution. On a CPU
# with AVX-512 a pass takes 0.24 ns at 0.18 TFLOP/s a core in bf16; fp32 halves both speeds. On GPUs, not measured:
# 1.3 ps at 400 TFLOP/s, with which the form `kernels` is hardly ever chosen.
_PASS = {"cpu": 43.0}
_PASS_ELSEWHERE = 500.0


# Bytes of patches or kernels that the form `kernels` makes at a time: on a CPU about the size of the last-level cache.
_PART = {"cpu": 32 << 20}
_PART_ELSEWHERE = 1 << 30


def choose(
    shape: Sequence[int], convolutions: Sequence[nn.Conv2d], device_type: str, input_gradient: bool = True
) -> Form:
    """The form in which to mix, from an estimate of operations and passes over memory.

    shape: (N, C, H, W) of the input. input_gradient: whether the backward pass needs the input's gradient. The choice
    depends on the arguments alone, never on a measurement: the forms round differently, and training must not depend
    on the machine or on the number of workers.

    The estimate, for the forward and backward pass of one image, in floating-point operations:
    `outputs` scales and adds every output image, in the backward pass scales it again and takes a dot product with it,
    and adds the gradients of x. `inputs` does about the same with the input images, scales them again in the backward
    pass, and adds the outputs, except those of 1x1 kernels, which a matrix product adds; all depthwise 1x1 kernels take
    the passes of one branch. `kernels` has the operations of one convolution, times 1.3 for smaller matrix products;
    the patches of x and of the gradient; eleven passes over its kernels (made twice, their gradients written and read
    twice), and twenty-five over all kernels to rearrange them, once a batch. `kernels` is chosen if it is faster by a
    tenth. `inputs` is not chosen without the gradient of x, from which it computes that of the coefficients. The
    constants are fitted to `python -m benchmarks.mixing`.
    """
    n, c, h, w = shape
    first, branches = convolutions[0], len(convolutions)
    o, size = first.out_channels, max(convolution.kernel_size[0] for convolution in convolutions)
    pixels = 1
    for axis, length in enumerate((h, w)):
        reach = first.dilation[axis] * (first.kernel_size[axis] - 1)
        pixels *= (length + 2 * int(first.padding[axis]) - reach - 1) // first.stride[axis] + 1
    inputs, outputs = c * h * w, o * pixels
    geometries = [_geometry(convolution) for convolution in convolutions]
    depthwise = len(_depthwise(geometries, [convolution.weight for convolution in convolutions]))
    spatial = sum(not _is_matrix_product(geometry) for geometry in geometries) - depthwise
    passes = {
        "outputs": 3.5 * branches * outputs + 1.5 * (branches - 1) * inputs,
        "inputs": 4.25 * (branches - max(depthwise - 1, 0)) * inputs + 1.5 * max(spatial - 1, 0) * outputs,
        "kernels": size**2 * ((11 + 25 * branches / n) * c * o + c * pixels + o * h * w),
    }
    # two operations for each multiply-add of the outputs, the kernels' gradient and the inputs' gradient
    per_product = 6 if input_gradient else 4
    operations = per_product * outputs * sum(convolution.weight[0].numel() for convolution in convolutions)
    one_pass = _PASS.get(device_type, _PASS_ELSEWHERE)
    form: Form = "inputs" if input_gradient and passes["inputs"] <= passes["outputs"] else "outputs"
    mixed_kernels = 1.3 * per_product * outputs * c * size**2 + one_pass * passes["kernels"]
    wins = mixed_kernels < 0.9 * (operations + one_pass * passes[form])
    return "kernels" if wins and _one_geometry(convolutions) else form


def exporting() -> bool:
    """Whether torch exports a graph. Up to torch 2.11 at least `is_exporting` is true of code that is compiled, too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def gradient_needed(x: Tensor) -> bool:
    """Whether to choose a form that has the gradient of x. True in evaluation, so that it has the form of training."""
    return x.requires_grad or not torch.is_grad_enabled()


def mix(
    coefficients: Tensor,
    x: Tensor,
    convolutions: Sequence[nn.Conv2d],
    form: Form | None = None,
    kernels: Sequence[Tensor] | None = None,
) -> Tensor:
    """The sum of convolutions of x, each weighted by one coefficient per image.

    coefficients: (N, L), float32 or float64. x: (N, C, H, W), fastest in channels_last. convolutions: L, with square
    kernels and zero padding, whose outputs have the same shape. form: the form to compute; None: that of `choose`.
    kernels: the convolutions' weights in the dtype of the result, where they are cast already.
    Returns (N, O, H', W') in channels_last, in x's dtype or, under autocast, in autocast's.
    Raises ValueError when form is `kernels` and the kernels cannot be summed.
    """
    device = x.device.type
    if exporting():
        form = "outputs"
    elif form is None:
        form = choose(x.shape, convolutions, device, gradient_needed(x))
    if form == "outputs":
        return weighted_sum(coefficients, [convolution(x) for convolution in convolutions])
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        x = x.to(dtype)
        weights = [*(kernels or (convolution.weight for convolution in convolutions))]
        weights = [weight.to(dtype) for weight in weights]
        total: Tensor
        if form == "inputs":
            total = _Inputs.apply(coefficients, x, tuple(map(_geometry, convolutions)), *weights)
        elif _one_geometry(convolutions):
            widest = _widest(convolutions)
            size = widest.kernel_size[0]
            weights = [F.pad(w, [(size - w.shape[-1]) // 2] * 4) if w.shape[-1] < size else w for w in weights]
            total = _Kernels.apply(coefficients, x, torch.stack(weights), int(widest.padding[0]), widest.dilation[0])
        else:
            raise ValueError("these kernels cannot be summed: strides, groups, dilations or parities differ")
        if any(convolution.bias is not None for convolution in convolutions):
            zero = convolutions[0].weight.new_zeros(convolutions[0].out_channels)
            biases = torch.stack(
                [zero if convolution.bias is None else convolution.bias for convolution in convolutions]
            )
            total = _AddToPixels.apply(total, coefficients @ biases.to(coefficients.dtype))
    return total


def weighted_sum(coefficients: Tensor, branches: Sequence[Tensor]) -> Tensor:
    """The sum of the outputs of L branches, each weighted by one coefficient per image: the form `outputs`, without the
    convolutions.

    coefficients: (N, L), float32 or float64. branches: L tensors (N, C, H, W) of one shape and dtype.
    Returns (N, C, H, W) in the branches' dtype, in channels_last.
    """
    total: Tensor
    if exporting():
        first, *rest = map(torch.mul, coefficients[:, :, None, None].split(1, 1), branches)
        total = sum(rest, first)
    else:
        total = _Outputs.apply(coefficients, *branches)
    return total


def average(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The average of each channel of x, (N, C, H, W): (N, C) of `dtype`, float32 or float64; and x.

    Use the returned x in place of the argument: both gradients are then added in one pass.
    """
    if exporting():
        return x.mean((2, 3), dtype=dtype), x
    result: tuple[Tensor, Tensor] = _Average.apply(x, dtype)
    return result


class _Outputs(torch.autograd.Function):
    """The form `outputs`: one pass over memory per branch, forward and backward, where autograd takes two or three."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, *branches: Tensor) -> Tensor:
        factors = coefficients.to(branches[0].dtype)
        scales = _scales(factors)
        ctx.save_for_backward(factors, *branches)
        ctx.dtype = coefficients.dtype
        total = _rows(branches[0]) * scales[0]
        for branch, scale in zip(branches[1:], scales[1:], strict=True):
            total.addcmul_(_rows(branch), scale)
        return _images(total, branches[0].shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors, *branches = ctx.saved_tensors
        shape, grad = grads[0].shape, _rows(grads[0])
        grad_branches = [
            _images(grad * scale, shape) if needed else None
            for scale, needed in zip(_scales(factors), ctx.needs_input_grad[1:], strict=True)
        ]
        if not ctx.needs_input_grad[0]:
            return (None, *grad_branches)
        dots = [_dot(grad, _rows(branch), ctx.dtype) for branch in branches]
        return (_columns(dots), *grad_branches)


class _Inputs(torch.autograd.Function):
    """The form `inputs`. All depthwise 1x1 kernels w_l together are one elementwise pass, in which each channel of an
    image is scaled by sum_l a_l * w_l."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, x: Tensor, geometries: tuple[_Geometry, ...], *weights: Tensor
    ) -> Tensor:
        factors = coefficients.to(x.dtype)
        scales = _scales(factors)
        ctx.save_for_backward(factors, x, *weights)
        ctx.geometries, ctx.dtype = geometries, coefficients.dtype
        rows, c = _rows(x), x.shape[1]
        depthwise = _depthwise(geometries, weights)
        total: Tensor | None = None  # (N, H', W', O)
        # 1x1 kernels last: their matrix products are added to the sum in place
        order = sorted(range(len(weights)), key=lambda position: _is_matrix_product(geometries[position]))
        for position in order:
            if position in depthwise:
                continue
            geometry, weight, scaled = geometries[position], weights[position], rows * scales[position]
            if not _is_matrix_product(geometry):
                stride, padding, dilation, groups, _ = geometry
                image = _images(scaled, x.shape)
                image = torch.convolution(image, weight, None, stride, padding, dilation, False, (0, 0), groups)
                image = image.permute(0, 2, 3, 1).contiguous()
                total = image if total is None else total.add_(image)
            elif total is None:
                total = torch.mm(scaled.view(-1, c), weight.flatten(1).t()).view(len(x), *x.shape[2:], -1)
            else:
                sums = total.view(-1, total.shape[3])
                torch.addmm(sums, scaled.view(-1, c), weight.flatten(1).t(), out=sums)
        if depthwise:
            by_channel = _by_channel(factors, weights, depthwise, x.shape[3])
            lines = _lines(x)
            total = lines * by_channel if total is None else total.view(lines.shape).addcmul_(lines, by_channel)
            total = total.view(len(x), *x.shape[2:], c)
        assert total is not None
        return total.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors, x, *weights = ctx.saved_tensors
        rows, c = _rows(x), x.shape[1]
        scales = _scales(factors)
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        pixels = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
        depthwise = _depthwise(ctx.geometries, weights)
        dots: list[Tensor] = [factors] * len(weights)
        grad_weights: list[Tensor] = list(weights)
        grad_x: Tensor | None = None
        for position, (geometry, weight) in enumerate(zip(ctx.geometries, weights, strict=True)):
            if position in depthwise:
                continue
            scaled = rows * scales[position]  # recomputed, which takes little of a convolution's time
            if _is_matrix_product(geometry):
                grad_scaled = torch.mm(pixels, weight.flatten(1)).view(len(x), -1)
                grad_weights[position] = _images(torch.mm(pixels.t(), scaled.view(-1, c)), weight.shape)
            else:
                stride, padding, dilation, groups, _ = geometry
                grad_image, grad_weights[position], _ = torch.ops.aten.convolution_backward(
                    *(grad, _images(scaled, x.shape), weight, None, stride, padding, dilation, False, (0, 0), groups),
                    (True, True, False),
                )
                grad_scaled = _rows(grad_image)
            dots[position] = _dot(grad_scaled, rows, ctx.dtype)
            if ctx.needs_input_grad[1]:
                scale = scales[position]
                grad_x = grad_scaled.mul_(scale) if grad_x is None else grad_x.addcmul_(grad_scaled, scale)
        if depthwise:
            # the products are rounded to x's dtype before they are summed over the pixels
            products = _sum_of_pixels(_images(_rows(grad) * rows, x.shape), ctx.dtype)  # (N, C)
            for position in depthwise:
                weight = weights[position]
                dots[position] = torch.mv(products, weight.flatten().to(ctx.dtype))
                grad_weight = torch.mv(products.t(), factors[:, position].to(ctx.dtype))
                grad_weights[position] = grad_weight.to(weight.dtype).view(weight.shape)
            if ctx.needs_input_grad[1]:
                lines, by_channel = _lines(grad), _by_channel(factors, weights, depthwise, x.shape[3])
                if grad_x is None:
                    grad_x = (lines * by_channel).view(rows.shape)
                else:
                    grad_x.view(lines.shape).addcmul_(lines, by_channel)
        grad_images = None if grad_x is None else _images(grad_x, x.shape)
        return (_columns(dots), grad_images, None, *grad_weights)


class _Kernels(torch.autograd.Function):
    """The form `kernels`: matrix products of every image's kernel with its patches, for as many images at a time as fit
    into the cache."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, x: Tensor, weights: Tensor, padding: int, dilation: int) -> Tensor:
        """weights: (L, O, C, K, K)."""
        ctx.save_for_backward(coefficients, x, weights)
        ctx.padding, ctx.dilation = padding, dilation
        branches, o, c, size, _ = weights.shape
        height, width = (length + 2 * padding - dilation * (size - 1) for length in x.shape[2:])
        total = x.new_empty(len(x), height, width, o).permute(0, 3, 1, 2)
        by_output = weights.permute(0, 1, 3, 4, 2).reshape(branches, -1)
        scales = coefficients.to(x.dtype)
        for part in _parts(x, size**2 * c * max(o, height * width)):
            kernels = torch.mm(scales[part], by_output).view(-1, o, size**2 * c)
            patches = _patches(x[part], size, padding, dilation)
            total[part] = torch.bmm(kernels, patches.transpose(1, 2)).unflatten(2, (height, width))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of x has the same form: the output's gradient is convolved with transposed and flipped kernels.
        # Its patches also give the gradient of the kernels.
        coefficients, x, weights = ctx.saved_tensors
        branches, o, c, size, _ = weights.shape
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        padding = ctx.dilation * (size - 1) - ctx.padding
        flipped = weights.flip(3, 4)
        by_input = flipped.permute(0, 2, 3, 4, 1).reshape(branches, -1)
        by_patch = flipped.permute(0, 3, 4, 1, 2).reshape(branches, -1)
        scales, pixels = coefficients.to(x.dtype), x.permute(0, 2, 3, 1).flatten(1, 2)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        grad_weights = torch.zeros_like(by_patch, dtype=coefficients.dtype)
        dots = []
        for part in _parts(x, size**2 * o * max(c, x.shape[2] * x.shape[3])):
            patches = _patches(grad[part], size, padding, ctx.dilation)
            if grad_x is not None:
                kernels = torch.mm(scales[part], by_input).view(-1, c, size**2 * o)
                grad_x[part] = torch.bmm(kernels, patches.transpose(1, 2)).unflatten(2, x.shape[2:])
            grad_kernels = torch.bmm(patches.transpose(1, 2), pixels[part]).flatten(1)
            dots.append(torch.mm(by_patch, grad_kernels.t()))
            grad_weights.add_(torch.mm(scales[part].t(), grad_kernels))
        grad_weights = grad_weights.view(branches, size, size, o, c).permute(0, 3, 4, 1, 2).flip(3, 4)
        grad_coefficients = torch.cat(dots, 1).t().to(coefficients.dtype)
        return grad_coefficients, grad_x, grad_weights.to(weights.dtype), None, None


class _AddToPixels(torch.autograd.Function):
    """Add one number per image and channel, (N, C), to all pixels of (N, C, H, W) images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, addends: Tensor) -> Tensor:
        ctx.dtype = addends.dtype
        return _add_to_pixels(x, addends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], _sum_of_pixels(grads[0], ctx.dtype)


class _Average(torch.autograd.Function):
    """See `average`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.pixels = x.shape[2:].numel()
        return _sum_of_pixels(x, dtype) / ctx.pixels, x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _add_to_pixels(grads[1], grads[0] / ctx.pixels), None


def _add_to_pixels(x: Tensor, addends: Tensor) -> Tensor:
    """The sum of x, (N, C, H, W), and addends, (N, C), for all pixels; computed on rows of W * C numbers, since rows
    of C are slow where there are few channels."""
    return _images(_lines(x) + addends.to(x.dtype).repeat(1, x.shape[3])[:, None], x.shape)


def _sum_of_pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the pixels of each channel: (N, C, H, W) to (N, C) of `dtype`."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return x.sum((2, 3), dtype=dtype)
    # A matrix product sums bf16 in float32, several times as fast as sum(), but rounds the result to bf16; a second
    # product computes the rounding error.
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    ones = _constant(1.0, (1, 1, 1), x).expand(len(x), 1, pixels.shape[1])
    total = torch.bmm(ones, pixels)
    error = torch.baddbmm(total, ones, pixels, beta=-1)
    return total.to(dtype).add_(error)[:, 0]


def _dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The dot products of rows, (N, K) and (N, K) to (N,) of `dtype`: for bf16 and fp16 on a CPU in one pass, in
    float32 without rounding the products."""
    if x.device.type != "cpu" or x.element_size() > 2 or not x.numel():
        return (x * y).sum(1, dtype=dtype)
    # The gradient of batch normalisation's scale is this dot product, if rows are channels with mean 0 and deviation 1.
    # A matrix product would depend on oneDNN, which is up to twelve times slower in some versions and on some CPUs.
    ones, zeros = (_constant(value, (len(x),), x, torch.float32) for value in (1.0, 0.0))
    arguments = (ones, None, None, zeros, ones, True, 0.0, (False, True, False))
    dots: Tensor = torch.ops.aten.native_batch_norm_backward(x[None], y[None], *arguments)[1]
    return dots.to(dtype)


_CONSTANTS: dict[tuple[float, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}


def _constant(value: float, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of one value, on the device and, by default, of the dtype of `like`; made once. Never write to it."""
    dtype = dtype or like.dtype
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # a graph or a tracer keeps its own
        return like.new_full(shape, value, dtype=dtype)
    key = value, shape, dtype, like.device
    if key not in _CONSTANTS:
        with torch.inference_mode(False):
            _CONSTANTS[key] = torch.full(shape, value, dtype=dtype, device=like.device)
    return _CONSTANTS[key]


def _columns(vectors: list[Tensor]) -> Tensor:
    """L vectors (N,) as (N, L)."""
    return torch.stack(vectors, 1) if len(vectors) > 1 else vectors[0][:, None]


def _scales(factors: Tensor) -> tuple[Tensor, ...]:
    """The coefficients (N, L), in the dtype of the images, as L factors (N, 1) for their rows."""
    return factors[:, :, None].unbind(1)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W * C), a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1)


def _lines(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H, W * C), a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(2)


def _by_channel(factors: Tensor, weights: Sequence[Tensor], depthwise: list[int], width: int) -> Tensor:
    """The factors of the channels of each image, sum_l a_l * w_l over depthwise kernels: (N, 1, width * C). factors:
    (N, L), of the weights' dtype. depthwise: the positions of these kernels among all L."""
    # a list of positions as an index would be copied to the GPU, which a CUDA graph cannot record
    chosen = torch.stack([factors[:, position] for position in depthwise], 1)
    sums = torch.mm(chosen, torch.stack([weights[position].flatten() for position in depthwise]))
    return sums.repeat(1, width)[:, None]


def _images(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows (N, H * W * C) as a view of `shape`, (N, C, H, W), in channels_last."""
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _patches(x: Tensor, size: int, padding: int, dilation: int) -> Tensor:
    """The input patch of each output pixel of a convolution (im2col): (N, C, H, W) to (N, H' * W', size * size * C)."""
    if padding:  # F.pad crops where it is negative
        x = F.pad(x, [padding] * 4)
    reach = dilation * (size - 1) + 1
    taps = x.permute(0, 2, 3, 1).unfold(1, reach, 1).unfold(2, reach, 1)[..., ::dilation, ::dilation]
    return taps.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def _parts(x: Tensor, numbers: int) -> list[slice]:
    """Slices of a batch whose buffers, of `numbers` elements an image, fit into the cache; the slices depend on shape,
    dtype and device type alone."""
    limit = _PART.get(x.device.type, _PART_ELSEWHERE)
    size = max(1, limit // (x.element_size() * numbers))
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _geometry(convolution: nn.Conv2d) -> _Geometry:
    padding = tuple(map(int, convolution.padding))
    return convolution.stride, padding, convolution.dilation, convolution.groups, convolution.kernel_size[0]


def _is_matrix_product(geometry: _Geometry) -> bool:
    """Whether a convolution is a matrix product over channels."""
    stride, padding, _, groups, size = geometry
    return size == groups == 1 and stride == (1, 1) and padding == (0, 0)


def _depthwise(geometries: Sequence[_Geometry], weights: Sequence[Tensor]) -> list[int]:
    """The positions of the 1x1 kernels that scale each channel by itself."""
    return [
        position
        for position, ((stride, padding, _, groups, size), weight) in enumerate(zip(geometries, weights, strict=True))
        if size == 1 and len(weight) == groups > 1 and stride == (1, 1) and padding == (0, 0) and weight.shape[1] == 1
    ]


def _widest(convolutions: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """The first of the convolutions with the largest kernel; torch 2.9 compiles no `max` with a key."""
    size = max(convolution.kernel_size[0] for convolution in convolutions)
    return next(convolution for convolution in convolutions if convolution.kernel_size[0] == size)


def _one_geometry(convolutions: Sequence[nn.Conv2d]) -> bool:
    """Whether all kernels, padded with zeros to one size, fit one convolution, so that they can be summed. Their
    centres agree, since their outputs have the same shape."""
    widest = _widest(convolutions)
    return all(
        convolution.stride == (1, 1)
        and convolution.groups == 1
        and (widest.kernel_size[0] - convolution.kernel_size[0]) % 2 == 0
        and (convolution.kernel_size[0] == 1 or convolution.dilation == widest.dilation)
        for convolution in convolutions
    )
