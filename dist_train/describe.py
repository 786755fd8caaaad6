"""An architecture as a table and as a picture.

    python -m dist_train.describe block94
    python -m dist_train.describe mine.toml model.blocks.0.channels=96 --picture mine.svg

Described is a preset, a TOML file or a run folder, with settings over it as the trainer takes them. FLOPs are those of
the convolutions and linear layers in the forward pass of one image, two for each multiply-add.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.data_prep.betons import MANIFEST
from dist_train.errors import UserError, command
from dist_train.files import write_atomic
from dist_train.plots import BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dist_train.config import Config
    from dist_train.settings import Block, Convolution, DataConfig, ModelConfig

Shape = tuple[int, int, int]

PICTURES = (".svg", ".png", ".pdf")
KNOWN = {"cifar10": ((32, 32), 10), "digits": ((32, 32), 10)}  # size and classes that a data set's name implies
LETTERS = {"d": "dilation", "g": "groups", "s": "stride", "p": "padding"}
SIZE, LEADING = 8.2, 9.8  # of the picture's letters and lines, in points
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_INK = "#010203"  # found again in the SVG that matplotlib writes; where it writes black it may write nothing


@dataclass(frozen=True)
class Layer:
    """A row of the table. part: `input`, `stem`, `block 1` to `block K`, `output`. shape: of what it gives for one
    image. learned: how many of the parameters are. flops: of one image's forward pass."""

    part: str
    name: str
    shape: tuple[int, ...]
    parameters: int = 0
    learned: int = 0
    flops: int = 0


def layers(model: ModelConfig, image_shape: Shape, classes: int) -> list[Layer]:
    """The layers from the input to the logits; a block's are its convolutions, its mixing, and in one row what
    follows the sum. image_shape: (C, H, W). Raises UserError for an architecture that cannot be built."""
    from dist_train.model import flops
    from dist_train.settings import shapes, summed

    entry, *left = shapes(model, image_shape)
    of_stem, *of_blocks, of_output = flops(model, image_shape, classes)
    rows = [Layer("input", "", image_shape)]
    if model.stem.kind != "none":
        kernels, bias = entry[0] * image_shape[0] * model.stem.kernel**2, entry[0]
        learned = bias if model.stem.kind == "whiten" else kernels + bias
        rows.append(Layer("stem", _stem(model), entry, kernels + bias, learned, of_stem[0]))
    scale = model.batch_norm.scale
    for number, block in enumerate(model.blocks):
        before, after = [entry, *left][number : number + 2]
        part, channels, (*of_branches, of_mixing) = f"block {number + 1}", block.channels, of_blocks[number]
        inside, behind = channels * (block.norm == "branch"), channels * (block.norm == "post")
        for position, (conv, work) in enumerate(zip(block.convolutions, of_branches, strict=True), 1):
            count = channels * (before[0] // conv.groups * conv.kernel**2 + conv.bias)
            name = ", ".join([f"a{position} * {conv.name} p{_padding(conv)}{' bias' * conv.bias}", *_inside(block)])
            shape = summed(block, before)
            rows.append(Layer(part, name, shape, count + 2 * inside, count + (1 + scale) * inside, work))
        count = (before[0] + 1) * len(of_branches)
        name = ", ".join(["a = averages", *_mixing(block, before[0])])
        rows.append(Layer(part, name, (len(of_branches),), count, count, of_mixing))
        rows.append(Layer(part, ", ".join(["sum", *_after(block)]), after, 2 * behind, (1 + scale) * behind))
    widths = [left[-1][0], *model.output.hidden, classes]
    for position, (name, work) in enumerate(zip(_output(model, widths), of_output, strict=True)):
        bias = position + 1 < len(of_output) or model.output.bias
        count = (widths[position] + bias) * widths[position + 1]
        rows.append(Layer("output", name, (widths[position + 1],), count, count, work))
    return rows


def totals(model: ModelConfig, image_shape: Shape, classes: int) -> dict[str, int]:
    """parameters, learned, bytes (of the parameters in float32), flops (forward), and for the forward and backward
    pass training_flops, and training_flops_stem_fixed once the stem no longer learns; all per image."""
    from dist_train.model import training_flops

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
    """The table for a terminal, and the totals."""
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
    """The same as a Markdown table and a list."""
    header, *rows = _cells(layers(model, image_shape, classes))
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    lines += [[f"**{part}**" if part else "", name.replace("*", "\\*"), *numbers] for part, name, *numbers in rows]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"- {remark}" for remark in _remarks(model, image_shape, classes))]) + "\n"


def _cells(rows: list[Layer]) -> list[list[str]]:
    """The table as header, rows and total: part, layer, output, parameters, share, FLOPs, share."""
    whole = Layer("total", "", (), sum(row.parameters for row in rows), 0, sum(row.flops for row in rows))

    def cells(row: Layer) -> list[str]:
        found = [row.part, row.name, _by(row.shape)]
        for mine, all_ in ((row.parameters, whole.parameters), (row.flops, whole.flops)):
            found += [f"{mine:,}", _percent(mine / all_, 1)] if mine else ["", ""]
        return found

    table = [["part", "layer", "output", "parameters", "%", "FLOPs", "%"]]
    for part, group in itertools.groupby(rows, lambda row: row.part):
        of_part = list(group)
        if len(of_part) > 1:
            parameters, flops = sum(row.parameters for row in of_part), sum(row.flops for row in of_part)
            table.append(cells(Layer(part, "", of_part[-1].shape, parameters, 0, flops)))
            of_part = [replace(row, part="") for row in of_part]
        table += map(cells, of_part)
    return [*table, cells(whole)]


def _remarks(model: ModelConfig, image_shape: Shape, classes: int) -> list[str]:
    """The totals in words, and what the letters mean."""
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


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _padding(conv: Convolution) -> int:
    return conv.dilation * (conv.kernel - 1) // 2 if conv.padding == "same" else conv.padding


def _activation(name: str) -> list[str]:
    return [name] if name != "identity" else []


def _stem(model: ModelConfig) -> str:
    stem = model.stem
    stride = f" s{stem.stride}" if stem.stride > 1 else ""
    fixed = ["fixed whitening"] if stem.kind == "whiten" else []
    name = f"{stem.kernel}x{stem.kernel}{stride} p{stem.padding} bias"
    return ", ".join([name, *fixed, *_activation(stem.activation)])


def _inside(block: Block) -> list[str]:
    """What follows a convolution in its branch, in order."""
    norm = ["norm"] if block.norm == "branch" else []
    return norm + (_activation(block.activation) if block.activate == "branch" else [])


def _mixing(block: Block, channels: int) -> list[str]:
    """What makes the coefficients of the channel averages, in order."""
    kind: list[str] = [block.coefficients] if block.coefficients != "raw" else []
    if block.coefficients == "softmax" and block.temperature != 1:
        kind = [f"softmax T{block.temperature:g}"]
    return [f"FC {channels} -> {len(block.convolutions)}", *kind]


def _after(block: Block) -> list[str]:
    """What follows a block's sum, in order."""
    pool = [f"{block.pool_kind} pool {block.pool}"] if block.pool != 1 else []
    return [
        *(pool if block.pool_at == "sum" else []),
        *(["norm"] if block.norm == "post" else []),
        *(_activation(block.activation) if block.activate == "post" else []),
        *(pool if block.pool_at == "end" else []),
        *([f"dropout {block.dropout:g}"] if block.dropout else []),
    ]


def _output(model: ModelConfig, widths: list[int]) -> list[str]:
    """The linear layers of the output block, each with what follows it."""
    output = model.output
    behind = _activation(output.activation) + ([f"dropout {output.dropout:g}"] if output.dropout else [])
    names = [", ".join([f"FC {a} -> {b}", *behind]) for a, b in itertools.pairwise(widths)]
    names[-1] = names[-1].partition(",")[0]
    return [f"averages, {names[0]}", *names[1:]]


def figure(model: ModelConfig, image_shape: Shape, classes: int, name: str = "", ink: str = "black") -> Figure:
    """The network from top to bottom, narrow enough for a phone. name: for its head. ink: of lines and text."""
    from dist_train.settings import shapes, summed

    entry, *left = shapes(model, image_shape)
    rows, whole = layers(model, image_shape, classes), totals(model, image_shape, classes)

    def sizes(part: str) -> str:
        parameters, flops = (
            sum(getattr(row, key) for row in rows if row.part == part) for key in ("parameters", "flops")
        )
        return f"{_short(parameters)} parameters, {_short(flops)} FLOPs ({_percent(flops / whole['flops'], 0)} %)"

    page = _Page(max(len(block.convolutions) for block in model.blocks), ink)
    if name:
        shown = name if len(name) < 40 else f"{name[:38]}…"
        page.write(page.left, page.y + 6, shown, size=10, weight="bold", ha="left")
        page.y += 15
    size = f"{_short(whole['parameters'])} parameters, {_short(whole['flops'])} FLOPs per image"
    page.write(page.left, page.y + 5, size, ha="left")
    page.y += 20
    page.write(page.middle, page.y + 3, f"images: {_by(image_shape)}")
    page.y += 9
    if model.stem.kind != "none":
        page.flow(12)
        with page.frame("stem", sizes("stem")):
            page.bar(_stem(model), BLUE)
    for number, (before, block) in enumerate(zip([entry, *left], model.blocks, strict=False), 1):
        page.flow(16, _by(before) if before != image_shape else "")
        with page.frame(f"block {number}", sizes(f"block {number}")):
            page.mixed(block, before[0], _by(summed(block, before)))
    page.flow(16, _by(left[-1]))
    with page.frame("output", sizes("output")):
        for number, step in enumerate(_output(model, [left[-1][0], *model.output.hidden, classes])):
            if number:
                page.flow(5)
            page.bar(step.replace("->", "→"), BLUE)
    page.flow(14, head=True)
    page.write(page.middle, page.y + 6, f"{classes} logits")
    page.y += 24
    legend = ", ".join(f"{letter} {word}" for letter, word in LETTERS.items())
    page.write(page.left, page.y, f"a mixing coefficients, {legend}", ha="left", size=7.5)
    return page.finish()


def svg(model: ModelConfig, image_shape: Shape, classes: int, name: str = "") -> str:
    """The picture as an `<svg>` element for an HTML page: as wide as there is room, lines and text in the page's
    current colour, no background, no ids that another on the page could share."""
    drawn = _saved(figure(model, image_shape, classes, name, _INK), ".svg", transparent=True).decode()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<defs>.*?</defs>", "", drawn, count=1, flags=re.DOTALL)  # a style that would hold for all the page
    drawn = re.sub(r' id="[^"]*"', "", drawn).replace(_INK, "currentColor")
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box
    label = escape(f"{name}: a network of {len(model.blocks)} blocks".removeprefix(": "))
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} width="100%" style="max-width: 540px" '
        f'stroke-linejoin="round" role="img" aria-label="{label}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: root, drawn, count=1)


def _saved(drawn: Figure, suffix: str, transparent: bool = False) -> bytes:
    """The same bytes for the same figure."""
    import matplotlib

    dates = {".svg": ("Date", "Creator", "Format", "Type"), ".pdf": ("CreationDate",), ".png": ()}
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "pdf.fonttype": 42}):
        metadata = dict.fromkeys(dates[suffix])
        drawn.savefig(file, format=suffix[1:], dpi=200, transparent=transparent, metadata=metadata)
    return file.getvalue()


class _Page:
    """A figure that grows downwards. Lengths are in points; y is the distance from its upper edge to where the next
    thing comes."""

    left = 12.0

    def __init__(self, branches: int, ink: str) -> None:
        """branches: of the block that has the most; more than six make the page wider than 300 points."""
        self.figure = new_figure()  # first: it keeps matplotlib quiet
        from matplotlib.transforms import Affine2D

        self.span = 33.0 * max(6, branches)  # what a block's branches share; its mixing comes right of them
        self.middle, self.right = self.left + 6 + self.span / 2, self.left + 6 + self.span + 78
        self.y, self.ink = 8.0, ink
        self.points = Affine2D()
        self.transform = self.points + self.figure.dpi_scale_trans

    def finish(self) -> Figure:
        """The figure, as high as what is on it."""
        self.figure.set_size_inches((self.right + self.left) / 72, (self.y + 8) / 72)
        self.points.scale(1 / 72, -1 / 72).translate(0, (self.y + 8) / 72)
        return self.figure

    def write(self, x: float, y: float, words: str, ha: str = "center", size: float = SIZE, **how: Any) -> None:
        """One line of text, its middle at y."""
        place: Any = {"transform": self.transform, "ha": ha, "va": "center"}
        self.figure.text(x, y, words, color=self.ink, size=size, parse_math=False, family="sans-serif", **place, **how)

    def line(self, *corners: tuple[float, float], color: str = "", head: bool = True) -> None:
        """Straight lines from corner to corner, with an arrow's head at the end."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Polygon

        color = color or self.ink
        xs, ys = zip(*corners, strict=True)
        self.figure.add_artist(Line2D(xs, ys, color=color, linewidth=0.8, transform=self.transform))
        if head:
            (x0, y0), (x, y) = corners[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            base = [(x - 4 * dx + side * dy, y - 4 * dy + side * dx) for side in (-1.8, 1.8)]
            arrow = Polygon([(x, y), *base], facecolor=color, edgecolor="none", transform=self.transform)
            self.figure.add_artist(arrow)

    def box(self, x: float, y: float, width: float, lines: list[str], color: str) -> float:
        """A box with lines of text, its upper edge's middle at (x, y). Returns the y of its lower edge."""
        height = LEADING * len(lines) + 4
        self._rectangle(x - width / 2, y, width, height, edgecolor=(color, 0.8), facecolor=(color, 0.12))
        for number, words in enumerate(lines):
            size = min(SIZE, (width - 4) / len(words) / 0.58)  # a letter is that wide, on average
            self.write(x, y + LEADING * (number + 0.5) + 2, words, size=size)
        return y + height

    def _rectangle(self, x: float, y: float, width: float, height: float, **how: Any) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=2.5"
        box = FancyBboxPatch((x, y), width, height, style, linewidth=0.8, transform=self.transform, **how)
        self.figure.add_artist(box)

    def flow(self, length: float, words: str = "", head: bool = False) -> None:
        """The way down from one thing to the next, and what shape the images have on it."""
        self.line((self.middle, self.y), (self.middle, self.y + length), head=head)
        self.write(self.middle + 5, self.y + length / 2, words, ha="left")
        self.y += length

    def bar(self, words: str, color: str) -> None:
        """A box as wide as all branches."""
        self.y = self.box(self.middle, self.y, self.span, [words], color)

    @contextmanager
    def frame(self, title: str, sizes: str) -> Iterator[None]:
        """A frame around what is drawn inside, which ends in its middle."""
        top = self.y
        self.write(self.left + 6, top + 8.5, title, ha="left", size=9, weight="bold")
        self.write(self.right - 6, top + 8.5, sizes, ha="right", size=7.5)
        self.flow(16)
        yield
        self.flow(6)
        size = self.right - self.left, self.y - top
        self._rectangle(self.left, top, *size, edgecolor=(self.ink, 0.4), facecolor="none")

    def mixed(self, block: Block, channels: int, summed: str) -> None:
        """What is in a block: its branches side by side, its mixing right of them, the sum, and what follows."""
        branches = len(block.convolutions)
        slot = self.span / branches
        xs = [self.left + 6 + slot * (number + 0.5) for number in range(branches)]
        width = min(slot - 4, 90)
        lines = [
            [*conv.name.split(), *([f"p{_padding(conv)}"] if _shrinks(conv) else []), *_inside(block)]
            for conv in block.convolutions
        ]
        if max(len(" ".join(words)) for words in lines) * 0.58 * SIZE < width - 4:
            lines = [[" ".join(words)] for words in lines]
        averages = self.right - 36
        fc = _mixing(block, channels)
        fc[0] = fc[0].replace("->", "→")
        # the entry is led to all of them
        top = self.y + 10
        bottom = top + max(17 + LEADING * (2 + len(fc)), 4 + LEADING * max(map(len, lines)))
        self.line((min(xs[0], self.middle), self.y), (averages, self.y), head=False)
        self.line((averages, self.y), (averages, top))
        y = self.box(averages, top, 60, ["channel", "averages"], ORANGE)
        self.line((averages, y), (averages, y + 9), color=ORANGE)
        y = self.box(averages, y + 9, 60, fc, ORANGE)
        row, coefficients = bottom + 8, bottom + 10 + LEADING / 2
        self.line((averages, y), (averages, coefficients), (xs[-1] + 11, coefficients), color=ORANGE)
        for number, (x, words) in enumerate(zip(xs, lines, strict=True)):
            start = (top + bottom - LEADING * len(words) - 4) / 2
            self.line((x, self.y), (x, start))
            end = self.box(x, start, width, words, BLUE)
            self.line((x, end), (x, row))
            end = self.box(x, row, 22, [f"\N{MULTIPLICATION SIGN} a{str(number + 1).translate(_SUBSCRIPTS)}"], ORANGE)
            self.line((x, end), (x, end + 9))
            if number:
                self.line((x - 11, coefficients), (xs[number - 1] + 11, coefficients), color=ORANGE)
        self.y = end + 9
        self.bar(f"sum: {summed}", self.ink)
        if after := _after(block):
            self.flow(5, head=False)
            self.bar(" → ".join(after), self.ink)


def _shrinks(conv: Convolution) -> bool:
    """Whether its padding is another than the one that keeps the size."""
    return 2 * _padding(conv) != conv.dilation * (conv.kernel - 1)


def _percent(share: float, digits: int) -> str:
    least = 10.0**-digits
    return f"{100 * share:.{digits}f}" if 100 * share >= least / 2 else f"<{least:g}"


def _short(number: int) -> str:
    """Three digits, such as 2.16 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return str(number)


def images(data: DataConfig, size: tuple[int, int] | None, classes: int | None) -> tuple[Shape, int]:
    """(C, H, W) of the images and the number of classes: those given, else of the betons, else as the settings and
    the data set's name imply. Raises UserError."""
    manifest = data.folder / MANIFEST
    if not (size and classes) and manifest.exists():
        try:
            found = json.loads(manifest.read_text())
            height, width, _ = found["image_shape"]
            size, classes = size or (height, width), classes or len(found["classes"])
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{manifest}: is not that of a data set; give --image-size and --classes") from None
    if data.image_size:
        size = size or (data.image_size, data.image_size)
    if data.dataset in KNOWN:
        size, classes = size or KNOWN[data.dataset][0], classes or KNOWN[data.dataset][1]
    if size is None or classes is None:
        raise UserError(
            f"data.dataset = {data.dataset}: {data.folder} does not hold it yet, and the name does not tell how large "
            f"its images are and of how many classes; give --image-size and --classes"
        )
    return (3, *size), classes


def _resolve(what: str, settings: list[str]) -> tuple[str, Config]:
    """The name and the configuration of a preset, a TOML file or a run folder. Raises UserError."""
    from dist_train import config

    path = Path(what)
    if what in config.presets():
        return what, config.load(what, None, settings)
    if path.is_dir():
        path /= "config.toml"
    if not path.exists():
        raise UserError(
            f"{what}: neither a preset ({', '.join(config.presets())}) nor a TOML file or run folder; name one"
        )
    name = path.resolve().parent.name if path.name == "config.toml" else path.stem
    return name, config.load(None, path, settings)


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_train.describe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="PRESET|FILE", help="a preset, a TOML file, or a run folder")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings over it")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON in place of the table")
    form.add_argument("--markdown", action="store_true", help="print Markdown in place of the table")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw it, as .svg, .png or .pdf")
    parser.add_argument(
        "--image-size",
        metavar="N|HxW",
        type=_size,
        help="height and width of the images in pixels (default: as the data set has)",
    )
    parser.add_argument(
        "--classes", metavar="N", type=_positive, help="how many there are (default: as the data set has)"
    )
    options = parser.parse_intermixed_args(arguments)
    picture: Path | None = options.picture
    if picture and picture.suffix not in PICTURES:
        raise UserError(f"--picture {picture}: end the file's name in {', '.join(PICTURES)}")
    name, settings = _resolve(options.what, options.settings)
    image_shape, classes = images(settings.data, options.image_size, options.classes)
    architecture = settings.model, image_shape, classes
    shown = text(*architecture)
    for smaller in settings.data.smaller:
        layers(settings.model, (3, smaller.size, smaller.size), classes)
    if picture:
        try:
            write_atomic(picture, _saved(figure(*architecture, name), picture.suffix))
        except OSError as error:
            raise UserError(f"--picture {picture}: cannot be written ({error.strerror}); name another") from None
    if options.json:
        rows = [asdict(row) for row in layers(*architecture)]
        head = {"name": name, "image_shape": image_shape, "classes": classes}
        print(json.dumps({**head, "layers": rows, "totals": totals(*architecture)}, indent=2))
    elif options.markdown:
        print(markdown(*architecture), end="")
    else:
        print(f"{name}: images of {_by(image_shape)}, {classes} classes\n\n{shown}", end="")
        if picture:
            print(f"picture: {picture}")
    return 0


def _positive(words: str) -> int:
    if not words.isdecimal() or not int(words):
        raise argparse.ArgumentTypeError(f"{words} is not a whole number above 0")
    return int(words)


def _size(words: str) -> tuple[int, int]:
    height, _, width = words.partition("x")
    return _positive(height), _positive(width or height)


if __name__ == "__main__":
    sys.exit(main())
