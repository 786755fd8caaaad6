"""Draws an architecture as a diagram."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from dist_train.config.settings import Block, Convolution, ModelConfig
from dist_train.errors import printable
from dist_train.model.shapes import padding_of, shapes, summed
from dist_train.reports.architecture import (
    LETTERS,
    Shape,
    branch_text,
    layers,
    mixing_text,
    output_text,
    percent,
    shape_text,
    short,
    stem_text,
    sum_text,
    totals,
)
from dist_train.reports.plots import BLUE, ORANGE, new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PICTURES = (".svg", ".png", ".pdf")
SIZE, LEADING = 8.2, 9.8  # font size and distance of lines, in points
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_INK = "#010203"  # a placeholder that `svg` replaces: matplotlib may omit black, the default of SVG


def figure(model: ModelConfig, image_shape: Shape, classes: int, name: str = "", ink: str = "black") -> Figure:
    """The network from top to bottom, narrow enough for a phone. image_shape: (C, H, W). name: the title; empty for
    none. ink: the colour of lines and text. Raises UserError for an architecture that cannot be built."""
    entry, *outputs = shapes(model, image_shape)
    rows, total = layers(model, image_shape, classes), totals(model, image_shape, classes)

    def sizes(part: str) -> str:
        parameters, flops = (
            sum(getattr(row, key) for row in rows if row.part == part) for key in ("parameters", "flops")
        )
        return f"{short(parameters)} parameters, {short(flops)} FLOPs ({percent(flops / total['flops'], 0)} %)"

    page = _Page(max(len(block.convolutions) for block in model.blocks), ink)
    if name:
        name = printable(name)
        title = name if len(name) < 40 else f"{name[:38]}…"
        page.write(page.left, page.y + 6, title, size=10, weight="bold", ha="left")
        page.y += 15
    size = f"{short(total['parameters'])} parameters, {short(total['flops'])} FLOPs per image"
    page.write(page.left, page.y + 5, size, ha="left")
    page.y += 20
    page.write(page.middle, page.y + 3, f"images: {shape_text(image_shape)}")
    page.y += 9
    if model.stem.kind != "none":
        page.flow(12)
        with page.frame("stem", sizes("stem")):
            page.bar(stem_text(model), BLUE)
    for number, (before, block) in enumerate(zip([entry, *outputs], model.blocks, strict=False), 1):
        page.flow(16, shape_text(before) if before != image_shape else "")
        with page.frame(f"block {number}", sizes(f"block {number}")):
            page.mixed(block, before[0], shape_text(summed(block, before)))
    page.flow(16, shape_text(outputs[-1]))
    with page.frame("output", sizes("output")):
        for number, step in enumerate(output_text(model, [outputs[-1][0], *model.output.hidden, classes])):
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
    """The picture as an `<svg>` element for an HTML page: scaled to the width of its container, lines and text in the
    page's current colour, no background, no ids that could clash with others on the page."""
    drawn = image_bytes(figure(model, image_shape, classes, name, _INK), ".svg", transparent=True).decode()
    drawn = drawn[drawn.index("<svg") :]
    # a style in <defs> would apply to the whole page
    drawn = re.sub(r"<defs>.*?</defs>", "", drawn, count=1, flags=re.DOTALL)
    drawn = re.sub(r' id="[^"]*"', "", drawn).replace(_INK, "currentColor")
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box
    label = escape(f"{name}: a network of {len(model.blocks)} blocks".removeprefix(": "))
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} width="100%" style="max-width: 540px" '
        f'stroke-linejoin="round" role="img" aria-label="{label}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: root, drawn, count=1)


def image_bytes(drawn: Figure, suffix: str, transparent: bool = False) -> bytes:
    """A figure as a file with one of the suffixes of PICTURES, the same bytes for the same figure."""
    import matplotlib

    dates = {".svg": ("Date", "Creator", "Format", "Type"), ".pdf": ("CreationDate",), ".png": ()}
    with matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "pdf.fonttype": 42}):
        metadata = dict.fromkeys(dates[suffix])
        return saved(drawn, format=suffix[1:], dpi=200, transparent=transparent, metadata=metadata)


class _Page:
    """A figure that grows downwards. Lengths are in points; y is the distance from its upper edge to where the next
    element is drawn."""

    left = 12.0

    def __init__(self, branches: int, ink: str) -> None:
        """branches: the largest number of convolutions in a block; more than six make the page wider than 300
        points."""
        self.figure = new_figure()  # before any import of matplotlib, whose warnings it silences
        from matplotlib.transforms import Affine2D

        self.span = 33.0 * max(6, branches)  # the width of all branches of a block; its mixing is drawn right of them
        self.middle, self.right = self.left + 6 + self.span / 2, self.left + 6 + self.span + 78
        self.y, self.ink = 8.0, ink
        self.points = Affine2D()
        self.transform = self.points + self.figure.dpi_scale_trans

    def finish(self) -> Figure:
        """The figure, with the height of its contents."""
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
        """A line down to the next element, with words beside it."""
        self.line((self.middle, self.y), (self.middle, self.y + length), head=head)
        self.write(self.middle + 5, self.y + length / 2, words, ha="left")
        self.y += length

    def bar(self, words: str, color: str) -> None:
        """A box as wide as all branches together."""
        self.y = self.box(self.middle, self.y, self.span, [words], color)

    @contextmanager
    def frame(self, title: str, sizes: str) -> Iterator[None]:
        """A frame around the elements that are drawn in the context."""
        top = self.y
        self.write(self.left + 6, top + 8.5, title, ha="left", size=9, weight="bold")
        self.write(self.right - 6, top + 8.5, sizes, ha="right", size=7.5)
        self.flow(16)
        yield
        self.flow(6)
        size = self.right - self.left, self.y - top
        self._rectangle(self.left, top, *size, edgecolor=(self.ink, 0.4), facecolor="none")

    def mixed(self, block: Block, channels: int, summed: str) -> None:
        """The contents of a block: its branches side by side, its mixing right of them, the sum, and the operations
        after it. channels: of its input. summed: the shape of the sum."""
        branches = len(block.convolutions)
        slot = self.span / branches
        xs = [self.left + 6 + slot * (number + 0.5) for number in range(branches)]
        width = min(slot - 4, 90)
        lines = [
            [*conv.name.split(), *([f"p{padding_of(conv)}"] if _shrinks(conv) else []), *branch_text(block)]
            for conv in block.convolutions
        ]
        if max(len(" ".join(words)) for words in lines) * 0.58 * SIZE < width - 4:
            lines = [[" ".join(words)] for words in lines]
        averages = self.right - 36
        fc = mixing_text(block, channels)
        fc[0] = fc[0].replace("->", "→")
        # lines from the input to the branches and, where the coefficients are per image, to the averages
        top = self.y + 10
        bottom = top + max(17 + LEADING * (2 + len(fc)), 4 + LEADING * max(map(len, lines)))
        reached = averages if block.per_image else max(xs[-1], self.middle)
        self.line((min(xs[0], self.middle), self.y), (reached, self.y), head=False)
        y = top
        if block.per_image:
            self.line((averages, self.y), (averages, top))
            y = self.box(averages, top, 60, ["channel", "averages"], ORANGE) + 9
            self.line((averages, y - 9), (averages, y), color=ORANGE)
        y = self.box(averages, y, 60, fc, ORANGE)
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
        if after := sum_text(block):
            self.flow(5, head=False)
            self.bar(" → ".join(after), self.ink)


def _shrinks(conv: Convolution) -> bool:
    """Whether the padding differs from the one that keeps the image size."""
    return 2 * padding_of(conv) != conv.dilation * (conv.kernel - 1)
