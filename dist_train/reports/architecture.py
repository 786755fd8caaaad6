"""An architecture as a table: its layers, their shapes, parameters and FLOPs."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace

from dist_train.config.settings import Block, DataConfig, ModelConfig
from dist_train.data_prep.betons import MANIFEST
from dist_train.errors import UserError
from dist_train.model.shapes import flops, padding_of, shapes, summed, training_flops
from dist_train.reports.markdown import literal, table

Shape = tuple[int, int, int]
KNOWN = {"cifar10": ((32, 32), 10), "digits": ((32, 32), 10)}  # by data set: height and width, number of classes
LETTERS = {"d": "dilation", "g": "groups", "s": "stride", "p": "padding"}  # in the names of convolutions


@dataclass(frozen=True)
class Layer:
    """A row of the table. part: `input`, `stem`, `block 1` to `block K`, `output`. shape: of its output for one
    image. learned: the number of its parameters that are trained. flops: of the forward pass of one image."""

    part: str
    name: str
    shape: tuple[int, ...]
    parameters: int = 0
    learned: int = 0
    flops: int = 0


def layers(model: ModelConfig, image_shape: Shape, classes: int) -> list[Layer]:
    """The layers from the input to the logits; those of a block are its convolutions, its mixing, and in one row the
    operations from the sum on. image_shape: (C, H, W). Raises UserError for an architecture that cannot be built."""
    entry, *outputs = shapes(model, image_shape)
    stem_flops, *block_flops, output_flops = flops(model, image_shape, classes)
    rows = [Layer("input", "", image_shape)]
    if model.stem.kind != "none":
        kernels, bias = entry[0] * image_shape[0] * model.stem.kernel**2, entry[0]
        learned = bias if model.stem.kind == "whiten" else kernels + bias
        rows.append(Layer("stem", stem_text(model), entry, kernels + bias, learned, stem_flops[0]))
    scale = model.batch_norm.scale
    for number, block in enumerate(model.blocks):
        before, after = [entry, *outputs][number : number + 2]
        part, channels, (*branch_flops, mixing_flops) = f"block {number + 1}", block.channels, block_flops[number]
        branch_norm, post_norm = channels * (block.norm == "branch"), channels * (block.norm == "post")
        for position, (conv, conv_flops) in enumerate(zip(block.convolutions, branch_flops, strict=True), 1):
            count = channels * (before[0] // conv.groups * conv.kernel**2 + conv.bias)
            name = ", ".join(
                [f"a{position} * {conv.name} p{padding_of(conv)}{' bias' * conv.bias}", *branch_text(block)]
            )
            shape = summed(block, before)
            rows.append(
                Layer(part, name, shape, count + 2 * branch_norm, count + (1 + scale) * branch_norm, conv_flops)
            )
        count = (before[0] * block.per_image + 1) * len(branch_flops)
        first, *then = [*(["averages"] if block.per_image else []), *mixing_text(block, before[0])]
        name = ", ".join([f"a = {first}", *then])
        rows.append(Layer(part, name, (len(branch_flops),), count, count, mixing_flops))
        rows.append(Layer(part, ", ".join(["sum", *sum_text(block)]), after, 2 * post_norm, (1 + scale) * post_norm))
    widths = [outputs[-1][0], *model.output.hidden, classes]
    for position, (name, layer_flops) in enumerate(zip(output_text(model, widths), output_flops, strict=True)):
        bias = position + 1 < len(output_flops) or model.output.bias
        count = (widths[position] + bias) * widths[position + 1]
        rows.append(Layer("output", name, (widths[position + 1],), count, count, layer_flops))
    return rows


def totals(model: ModelConfig, image_shape: Shape, classes: int) -> dict[str, int]:
    """By name: parameters, learned (of them), bytes (of the parameters in float32); and per image flops (of the forward
    pass), training_flops (forward and backward) and training_flops_stem_fixed (when the stem no longer learns)."""
    rows = layers(model, image_shape, classes)
    parameters = sum(row.parameters for row in rows)
    return {
        "parameters": parameters,
        "learned": sum(row.learned for row in rows),
        "bytes": 4 * parameters,
        "flops": sum(row.flops for row in rows),
        "training_flops": training_flops(model, image_shape, classes, True),
        "training_flops_stem_fixed": training_flops(model, image_shape, classes, False),
    }


def text(model: ModelConfig, image_shape: Shape, classes: int) -> str:
    """The table and the totals for a terminal."""
    rows = _cells(layers(model, image_shape, classes))
    lines = [[f"{part}  {name}".rstrip() if part else f"  {name}", *numbers] for part, name, *numbers in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    aligned.insert(1, "-" * len(aligned[0]))
    aligned.insert(-1, "-" * len(aligned[0]))
    return "\n".join([*(line.rstrip() for line in aligned), "", *_remarks(model, image_shape, classes)]) + "\n"


def markdown(model: ModelConfig, image_shape: Shape, classes: int) -> str:
    """The table and the totals as a Markdown table and list."""
    header, *rows = _cells(layers(model, image_shape, classes))
    rows = [[f"**{part}**" if part else "", literal(name), *numbers] for part, name, *numbers in rows]
    remarks = [f"- {remark}\n" for remark in _remarks(model, image_shape, classes)]
    return "\n".join([table(header, rows, ["---", "---", *["---:"] * (len(header) - 2)]), "".join(remarks)])


def _cells(rows: list[Layer]) -> list[list[str]]:
    """The table as header, rows and total: part, layer, output, parameters, share, FLOPs, share."""
    total = Layer("total", "", (), sum(row.parameters for row in rows), 0, sum(row.flops for row in rows))

    def row_cells(row: Layer) -> list[str]:
        cells = [row.part, row.name, shape_text(row.shape)]
        for number, of in ((row.parameters, total.parameters), (row.flops, total.flops)):
            cells += [f"{number:,}", percent(number / of, 1)] if number else ["", ""]
        return cells

    table = [["part", "layer", "output", "parameters", "%", "FLOPs", "%"]]
    for part, group in itertools.groupby(rows, lambda row: row.part):
        part_rows = list(group)
        if len(part_rows) > 1:
            parameters, flops = sum(row.parameters for row in part_rows), sum(row.flops for row in part_rows)
            table.append(row_cells(Layer(part, "", part_rows[-1].shape, parameters, 0, flops)))
            part_rows = [replace(row, part="") for row in part_rows]
        table += map(row_cells, part_rows)
    return [*table, row_cells(total)]


def _remarks(model: ModelConfig, image_shape: Shape, classes: int) -> list[str]:
    """The totals in words, and the meaning of the letters."""
    n = totals(model, image_shape, classes)
    training = f"{n['training_flops']:,}"
    if n["training_flops_stem_fixed"] != n["training_flops"]:
        training += f" ({n['training_flops_stem_fixed']:,} if the stem does not learn)"
    return [
        f"parameters: {n['parameters']:,}, of which {n['learned']:,} are learned; {n['bytes'] / 1e6:.2f} MB at fp32",
        f"FLOPs forward: {n['flops']:,} per image, two for each multiply-add of convolutions and linear layers",
        f"FLOPs forward and backward: {training} per image",
        f"{', '.join(f'{letter} {word}' for letter, word in LETTERS.items())}; a: the mixing coefficients",
    ]


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape such as 64 x 31 x 31."""
    return " x ".join(map(str, shape))


def _activation(name: str) -> list[str]:
    return [name] if name != "identity" else []


def stem_text(model: ModelConfig) -> str:
    """The stem's convolution and what follows it, in order."""
    stem = model.stem
    stride = f" s{stem.stride}" if stem.stride > 1 else ""
    fixed = ["fixed whitening"] if stem.kind == "whiten" else []
    name = f"{stem.kernel}x{stem.kernel}{stride} p{stem.padding} bias"
    return ", ".join([name, *fixed, *_activation(stem.activation)])


def branch_text(block: Block) -> list[str]:
    """The operations after a convolution in its branch, in order."""
    norm = ["norm"] if block.norm == "branch" else []
    return norm + (_activation(block.activation) if block.activate == "branch" else [])


def mixing_text(block: Block, channels: int) -> list[str]:
    """The operations to the coefficients, from the channel averages where they are per image, in order."""
    kind: list[str] = [block.coefficients] if block.coefficients != "raw" else []
    if block.coefficients == "softmax" and block.temperature != 1:
        kind = [f"softmax T{block.temperature:g}"]
    count = len(block.convolutions)
    return [f"FC {channels} -> {count}" if block.per_image else f"{count} learned number{'s' * (count > 1)}", *kind]


def sum_text(block: Block) -> list[str]:
    """The operations after a block's sum, in order."""
    pool = [f"{block.pool_kind} pool {block.pool}"] if block.pool != 1 else []
    return [
        *(pool if block.pool_at == "sum" else []),
        *(["norm"] if block.norm == "post" else []),
        *(_activation(block.activation) if block.activate == "post" else []),
        *(pool if block.pool_at == "end" else []),
        *([f"dropout {block.dropout:g}"] if block.dropout else []),
    ]


def output_text(model: ModelConfig, widths: list[int]) -> list[str]:
    """The linear layers of the output block, each with the operations after it. widths: of its input and of each
    layer's output."""
    output = model.output
    after = _activation(output.activation) + ([f"dropout {output.dropout:g}"] if output.dropout else [])
    names = [", ".join([f"FC {a} -> {b}", *after]) for a, b in itertools.pairwise(widths)]
    names[-1] = names[-1].partition(",")[0]
    return [f"averages, {names[0]}", *names[1:]]


def percent(share: float, digits: int) -> str:
    """A share from 0 to 1 in percent, with this number of decimals; smaller ones such as <0.1."""
    least = 10.0**-digits
    return f"{100 * share:.{digits}f}" if 100 * share >= least / 2 else f"<{least:g}"


def short(number: int) -> str:
    """A number with three digits and the prefix of a unit, such as 2.16 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return str(number)


def images(data: DataConfig, size: tuple[int, int] | None, classes: int | None) -> tuple[Shape, int]:
    """(C, H, W) of the images and the number of classes: those given, else those of the betons, else those that the
    settings or the data set's name imply. Raises UserError where they are unknown."""
    manifest = data.folder / MANIFEST
    if not (size and classes) and manifest.exists():
        try:
            contents = json.loads(manifest.read_text(encoding="utf-8"))
            height, width, _ = contents["image_shape"]
            size, classes = size or (height, width), classes or len(contents["classes"])
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{manifest}: is not the manifest of a data set; give --image-size and --classes") from None
    if data.image_size:
        size = size or (data.image_size, data.image_size)
    if data.dataset in KNOWN:
        size, classes = size or KNOWN[data.dataset][0], classes or KNOWN[data.dataset][1]
    if size is None or classes is None:
        raise UserError(
            f"data.dataset = {data.dataset}: {data.folder} does not hold it yet, and the name does not imply "
            f"the size of its images and the number of classes; give --image-size and --classes"
        )
    return (3, *size), classes
