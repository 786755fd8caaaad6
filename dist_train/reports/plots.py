"""The two plots of a run folder, drawn from its `metrics.jsonl` alone."""

from __future__ import annotations

import io
import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dist_train.config.settings import TrainConfig
from dist_train.errors import printable
from dist_train.files import write_atomic
from dist_train.runs import layout
from dist_train.runs.metrics import Row, best_eval
from dist_train.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#555555",
)  # Okabe and Ito: safe for the colour-blind

DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}  # by name in the configuration, the names for titles


def draw(run_dir: Path, *, dataset: str = "", name: str = "") -> list[Path]:
    """Write `plots/loss.png` and `plots/accuracy.png` of a run folder, and return their paths.

    Args:
        run_dir: a run folder with a `metrics.jsonl`; it may be empty.
        dataset: the data set's name, for the titles; empty: that of its configuration, if it has one.
        name: the run's name, for the titles; empty: the run folder's.

    Raises:
        UserError: `metrics.jsonl` is missing, cannot be read, or is damaged before its last line.
        OSError: the plots cannot be written.
    """
    run = Run(run_dir)
    run.need(layout.METRICS)
    dataset = dataset or (run.settings.data.dataset if run.begun else "")
    settings = run.settings.train if run.begun else None
    name = (name or run_dir.resolve().name).encode(errors="backslashreplace").decode()  # it may not be UTF-8
    figures = {
        run_dir / layout.LOSS_PLOT: loss_figure(run.steps, dataset=dataset, name=name, settings=settings),
        run_dir / layout.ACCURACY_PLOT: accuracy_figure(run.evals, dataset=dataset, name=name, settings=settings),
    }
    for path, figure in figures.items():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, saved(figure, format="png", dpi=150))
    return [*figures]


def loss_figure(steps: list[Row], *, dataset: str, name: str, settings: TrainConfig | None = None) -> Figure:
    """Training loss against training batches: every batch, and a smoothed line over it; shaded where the run trains on
    selected images.

    The loss axis is logarithmic where the smoothed line falls below a tenth of its highest value.
    """
    figure, axes = _figure("Training loss", dataset, name)
    from matplotlib.ticker import LogLocator, MaxNLocator  # after `new_figure`, which silences the first import

    axes.set(xlabel="training batches", ylabel="loss (mean over the batch)")
    if not steps:
        return _empty(figure, axes, "no training batch yet")
    batch = np.array([row["step"] for row in steps], dtype=np.float64)
    loss = np.array([row["loss"] for row in steps], dtype=np.float64)  # None becomes nan: a gap
    width = max(5, len(steps) // 60) if len(steps) >= 20 else 1
    mean = smooth(loss, width)
    axes.plot(batch, loss, color=BLUE, alpha=0.4, linewidth=0.7, label="each batch", **_dots(loss))
    if width > 1:
        axes.plot(batch, mean, color=BLUE, linewidth=1.8, label=f"smoothed over {width} batches")
    if (bad := ~np.isfinite(loss)).any():
        axes.plot(
            batch[bad],
            np.full(int(bad.sum()), 0.02),
            "x",
            color=ORANGE,
            transform=axes.get_xaxis_transform(),
            label=f"loss not finite ({int(bad.sum())})",
        )
    if np.isfinite(mean).any() and 0 < np.nanmin(mean) < np.nanmax(mean) / 10 and np.nanmin(loss) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlim(0, 1.02 * batch[-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    per_epoch = batch[-1] / steps[-1]["epoch"]
    _shade_selection(axes, settings, steps[-1]["epoch"], per_epoch)
    top = axes.secondary_xaxis("top", functions=(lambda x: x / per_epoch, lambda x: x * per_epoch))
    top.set_xlabel("epochs", color=GREY)
    top.set_ticks(epoch_ticks(steps[-1]["epoch"]))
    top.xaxis.set_major_formatter("{x:.4g}")
    top.tick_params(colors=GREY)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def accuracy_figure(evals: list[Row], *, dataset: str, name: str, settings: TrainConfig | None = None) -> Figure:
    """Train and test accuracy (and validation accuracy) in percent against epochs; shaded where the run trains on
    selected images.

    The last value of each is marked and labelled, and the best test accuracy; the last test accuracy is the result.
    """
    figure, axes = _figure("Accuracy", dataset, name)
    axes.set(xlabel="epochs", ylabel="accuracy (%)")
    epoch = np.array([row["epoch"] for row in evals], dtype=np.float64)
    ends: list[tuple[float, str, str]] = []
    for kind, color, style in (("train", BLUE, "--"), ("val", GREEN, "-."), ("test", ORANGE, "-")):
        key = f"{kind}_accuracy"
        percent = 100 * np.array([row.get(key) for row in evals], dtype=np.float64)
        if not np.isfinite(percent).any():
            continue
        axes.plot(epoch, percent, style, color=color, linewidth=1.6, label=kind, **_dots(percent))
        if np.isfinite(percent[-1]):
            axes.plot(epoch[-1], percent[-1], "o", color=color, markersize=7, zorder=3)
            ends.append((float(percent[-1]), f"{kind} {percent[-1]:.2f} %", color))
    if not evals:
        return _empty(figure, axes, "no evaluation yet")
    if (best := best_eval(evals)) is not None:
        value = 100 * best["test_accuracy"]
        axes.plot(
            best["epoch"],
            value,
            "*",
            color=ORANGE,
            markeredgecolor="black",
            markersize=13,
            zorder=4,
            label=f"best test: {value:.2f} %, epoch {best['epoch']}",
        )
    _shade_selection(axes, settings, epoch[-1])
    axes.set_xticks(epoch_ticks(epoch[-1]))
    axes.xaxis.set_major_formatter("{x:.4g}")
    axes.set_xlim(0, 1.03 * epoch[-1])
    axes.margins(y=0.08)
    # The last values stand right of the axes, moved apart where they would cover each other.
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    gap, lowest = 0.06 * (top - bottom), -np.inf
    for value, text, color in sorted(ends):
        lowest = max(value, lowest + gap)
        axes.annotate(text, (1.015, lowest), xycoords=axes.get_yaxis_transform(), color=color, va="center", fontsize=10)
    axes.text(1.015, 1.02, "last", transform=axes.transAxes, color=GREY, va="bottom", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)  # outside: it covers no point
    return figure


def new_figure(**options: Any) -> Figure:
    """An empty figure of matplotlib. options: those of its `Figure`."""
    # silences warnings about the list of fonts: that it is built, and that it cannot be saved without a home folder
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(**options)


def saved(figure: Figure, **options: Any) -> bytes:
    """The bytes of a figure's file. options: those of its `savefig`."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # of names in a script that the font does not have
        figure.savefig(file, **options)
    return file.getvalue()


def _figure(title: str, dataset: str, name: str) -> tuple[Figure, Axes]:
    figure = new_figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    data = DATASETS.get(dataset) or (f"data set: {dataset}" if dataset else "data set not recorded")
    axes.set_title(printable(f"{title} · {data} · {name}"), fontsize=12, loc="left", parse_math=False, wrap=True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shade_selection(axes: Axes, settings: TrainConfig | None, last: float, per_epoch: float = 1) -> None:
    """Shade the part of a run in which it trains on the hardest images, whose losses are higher and accuracy lower.

    last: the last epoch in the plot. per_epoch: units of the axis in an epoch.
    """
    if settings is None or settings.select.fraction == 1:
        return
    start, end = settings.select.start * settings.epochs, min(settings.select.until * settings.epochs, last)
    if start < end:
        label = f"trained on the hardest {100 * settings.select.fraction:g} %"
        axes.axvspan(per_epoch * start, per_epoch * end, color=GREY, alpha=0.12, linewidth=0, zorder=0, label=label)


def _empty(figure: Figure, axes: Axes, sentence: str) -> Figure:
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xticks=[], yticks=[])
    return figure


def epoch_ticks(last: float) -> list[float]:
    """Ticks of an axis from 0 to the epoch `last`: whole epochs at one distance, at most nine, and the last one itself
    in place of those that are near it."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if last / step <= 8)
    return [*(float(tick) for tick in range(0, math.ceil(last), step) if last - tick > 0.6 * step or not tick), last]


def smooth(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """The mean of the `width` values around each, weighted by a Hann window; at the ends of fewer values. nan is
    skipped."""
    finite = np.isfinite(values)
    window = np.hanning(width + 2)[1:-1]
    weight = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    mean: npt.NDArray[np.float64] = np.full(len(values), np.nan)
    np.divide(total, weight, out=mean, where=weight > 0)
    return mean


def _dots(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Line options that keep a short series visible: one point alone has no line."""
    return {"marker": "."} if len(values) < 50 else {}
