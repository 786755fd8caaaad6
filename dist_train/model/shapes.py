"""Shapes and FLOPs of an architecture, and a check that it can be built, without torch."""

from __future__ import annotations

import itertools
import math

from dist_train.config.settings import Block, Config, Convolution, ModelConfig
from dist_train.errors import UserError


def convolved(size: int, kernel: int, dilation: int, stride: int, padding: int) -> int:
    """The side of a convolution's output in pixels. size: the side of its input in pixels."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def padding_of(conv: Convolution, where: str = "convolution") -> int:
    """The zeros on each side of an image, in pixels. where: the convolution's name in messages. Raises UserError where
    no padding keeps the image size."""
    if conv.padding != "same":
        return conv.padding
    reach = conv.dilation * (conv.kernel - 1)
    if reach % 2:
        raise UserError(
            f'{where}: padding = "same" needs an odd kernel or an even dilation, but kernel = {conv.kernel} '
            f"with dilation = {conv.dilation}; give the padding as a number"
        )
    return reach // 2


def image_shapes(config: Config, image_shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The (C, H, W) of all images that a run gives its network: whole ones, smaller ones, and those that it selects by.

    image_shape: (H, W, C) of the data set's images."""
    height, width, channels = image_shape
    sizes = [(height, width), *((smaller.size, smaller.size) for smaller in config.data.smaller)]
    sizes += [config.train.select.image_size(*size) for size in sizes]
    return [(channels, *size) for size in dict.fromkeys(sizes)]


def check_shapes(config: Config, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError for an architecture that cannot be built for all images of a run. image_shape: (H, W, C) of the
    data set's."""
    for shape in image_shapes(config, image_shape):
        shapes(config.model, shape)


def shapes(config: ModelConfig, image_shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """The (C, H, W) of the input of block 1, and of the output of every block.

    image_shape: (C, H, W) of the network's input. Raises UserError, with the numbers of block and convolution, for an
    architecture that cannot be built.
    """
    channels, height, width = image_shape
    stem = config.stem
    if stem.kind != "none":
        channels = 2 * channels * stem.kernel**2 if stem.kind == "whiten" else stem.channels
        height = convolved(height, stem.kernel, 1, stem.stride, stem.padding)
        width = convolved(width, stem.kernel, 1, stem.stride, stem.padding)
        if min(height, width) < 1:
            raise UserError(
                f"model.stem: kernel = {stem.kernel} leaves nothing of an image of "
                f"{image_shape[1]}x{image_shape[2]} pixels; make it smaller"
            )
    image_shapes = [(channels, height, width)]
    for number, block in enumerate(config.blocks, 1):
        sizes: list[tuple[int, ...]] = []
        for position, conv in enumerate(block.convolutions, 1):
            where = f"model.blocks: block {number}, convolution {position}"
            for name, count in (("input", channels), ("output", block.channels)):
                if count % conv.groups:
                    raise UserError(
                        f"{where}: groups = {conv.groups} does not divide its {count} {name} channels; "
                        f"choose a divisor of {math.gcd(channels, block.channels)}"
                    )
            pad = padding_of(conv, where)
            size = tuple(convolved(n, conv.kernel, conv.dilation, conv.stride, pad) for n in (height, width))
            if min(size) < 1:
                raise UserError(
                    f"{where}: kernel = {conv.kernel} with dilation = {conv.dilation} and padding = {pad} leaves "
                    f"nothing of an image of {height}x{width} pixels; make it smaller or pad more"
                )
            if sizes and size != sizes[0]:
                raise UserError(
                    f"{where} gives images of {size[0]}x{size[1]} pixels where convolution 1 gives "
                    f"{sizes[0][0]}x{sizes[0][1]}; change its kernel, dilation, stride or padding"
                )
            sizes.append(size)
        height, width = (1, 1) if block.pool == "all" else (n // block.pool for n in sizes[0])
        if min(height, width) < 1:
            raise UserError(
                f"model.blocks: block {number}: pool = {block.pool} leaves nothing of an image of "
                f"{sizes[0][0]}x{sizes[0][1]} pixels; make it smaller"
            )
        channels = block.channels
        image_shapes.append((channels, height, width))
    return image_shapes


def summed(block: Block, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The (C, H, W) of the outputs of a block's convolutions, before pooling. shape: (C, H, W) of the block's input."""
    conv, (_, height, width) = block.convolutions[0], shape
    geometry = conv.kernel, conv.dilation, conv.stride, padding_of(conv)
    return block.channels, convolved(height, *geometry), convolved(width, *geometry)


def flops(config: ModelConfig, image_shape: tuple[int, int, int], classes: int) -> list[list[int]]:
    """Floating-point operations of one image's forward pass in convolutions and linear layers, two for each
    multiply-add.

    image_shape: (C, H, W). Returns those of the stem, of each block and of the output block, in order: one number for
    each convolution or linear layer, a block's convolutions first and then its mixing. Raises UserError as `shapes`.
    """
    stem = config.stem
    inputs = [image_shape, *shapes(config, image_shape)]
    layers = [[2 * math.prod(inputs[1]) * image_shape[0] * stem.kernel**2] if stem.kind != "none" else []]
    for shape, block in zip(inputs[1:], config.blocks, strict=False):
        convolutions = []
        for conv in block.convolutions:
            convolutions.append(2 * math.prod(summed(block, shape)) * conv.kernel**2 * shape[0] // conv.groups)
        layers.append([*convolutions, 2 * shape[0] * len(convolutions) * block.per_image])
    widths = [inputs[-1][0], *config.output.hidden, classes]
    return [*layers, [2 * a * b for a, b in itertools.pairwise(widths)]]


def check_training(
    config: Config,
    image_shape: tuple[int, int, int],
    classes: int,
    test_images: int,
    weights: float,
    activations: float,
) -> None:
    """Raises UserError for a network that cannot be built or trained on images of this shape.

    image_shape: (C, H, W). test_images: images that an evaluation may take at a time. weights, activations: bytes of
    the memory for weights with their gradients, and for these and the images of the layers together.
    """
    model, train = config.model, config.train
    inputs = shapes(model, image_shape)
    images = train.batch_size // train.microbatches
    for number, (block, before, after) in enumerate(zip(model.blocks, inputs, inputs[1:], strict=False), 1):
        normalised = after if (block.norm, block.pool_at) == ("post", "sum") else summed(block, before)
        if block.norm != "none" and train.select.kept(images) * math.prod(normalised[1:]) == 1:
            kept = f", of which train.select.fraction = {train.select.fraction:g} is kept" if images > 1 else ""
            raise UserError(
                f"model.blocks: block {number}: its BatchNorm would have one value of each channel, since a microbatch "
                f"(train.batch_size = {train.batch_size} in train.microbatches = {train.microbatches}{kept}) is one "
                f'image, of one pixel there; raise train.batch_size, or set norm = "none"'
            )
    # at the least: float32 weights and gradients, and the outputs of all blocks, which the backward pass reads
    stem, *blocks, output = flops(model, image_shape, classes)
    count = sum(stem) // math.prod(inputs[0][1:]) + sum(output)  # two for each weight, as that many operations
    for block, before, layers in zip(model.blocks, inputs, blocks, strict=False):
        count += sum(layers[:-1]) // math.prod(summed(block, before)[1:]) + layers[-1]
    learned = count // 2 * 8
    if learned > weights:
        raise UserError(
            f"model: its weights and their gradients take {learned / 1e9:,.0f} GB, and this machine has "
            f"{weights / 1e9:,.0f} GB of memory; lower the numbers of channels or the sizes of the kernels"
        )
    size = 4 if train.precision == "fp32" else 2
    needed = learned + images * size * sum(map(math.prod, inputs))
    if needed > activations:
        raise UserError(
            f"train.batch_size = {train.batch_size} in train.microbatches = {train.microbatches}: a microbatch of "
            f"{images:,} images takes at least {needed / 1e9:,.0f} GB, and this machine has "
            f"{activations / 1e9:,.0f} GB of memory; lower train.batch_size, or make the network smaller"
        )
    evaluated = min(config.data.eval_batch, test_images)
    needed = learned // 2 + evaluated * size * max(map(math.prod, inputs))
    if needed > activations:
        raise UserError(
            f"data.eval_batch = {config.data.eval_batch}: {evaluated:,} images take at least {needed / 1e9:,.0f} GB, "
            f"and this machine has {activations / 1e9:,.0f} GB of memory; lower it, or make the network smaller"
        )


def training_flops(config: ModelConfig, image_shape: tuple[int, int, int], classes: int, stem_learns: bool) -> int:
    """Floating-point operations of one image's forward and backward pass. In the backward pass a layer takes as many as
    in the forward pass for the gradient of its weights, and as many for that of its input, which is computed only where
    an earlier layer learns."""
    learns = stem_learns and config.stem.kind != "none"
    stem, first, *rest = map(sum, flops(config, image_shape, classes))
    return (2 if learns and config.stem.kind == "conv" else 1) * stem + (3 if learns else 2) * first + 3 * sum(rest)
