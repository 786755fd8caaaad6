"""The figures of the report, as plotly's JSON. The page draws them, and replaces the names of colours.

A colour is a name in report.css such as `--c0`; `--c0 0.3` is that with an opacity of 0.3. Only the values of keys that
end with "color" or "colorscale" are colours. The `meta` of a trace names its run and its entry of the legend. All text
goes through `_plain`: plotly reads it as HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import numpy.typing as npt

from dist_train.reports.groups import PageRun
from dist_train.reports.plots import epoch_ticks, smooth
from dist_train.reports.statistics import proportion
from dist_train.runs.metrics import Row

Values = npt.NDArray[np.float64]
_POINTS = 6_000  # of one quantity in a figure, of all runs together
_FEW = 3  # the number of runs up to which overlapping lines of single batches and bands are drawn strongly
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_DOWN = {"autorange": "reversed"}
_HIGH, _LOW = 320, 240  # pixels
_WRITTEN = 20  # the number of classes up to which a heat map has its numbers in the cells, where there is room
_ROWS = 40  # classes that a figure with a row for each shows at most
_CONFUSED = 20  # classes of a confusion matrix of more than _ROWS classes
_EVALUATED = (("test", "test", "--c1"), ("train", "train", "--c0"), ("val", "validation", "--c2"))


@dataclass(frozen=True)
class Part:
    """An entry of a figure's legend, a button that shows and hides its lines. dash: one of plotly's, or `marker`."""

    key: str
    label: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True)
class Figure:
    """A figure of the page. alt: its contents in words. traces, layout: plotly's. parts: its legend. height: in pixels;
    0: as high as wide."""

    id: str
    title: str
    alt: str
    traces: list[Row]
    layout: Row
    caption: str = ""
    parts: list[Part] = field(default_factory=list)
    height: int = _HIGH


def curves(runs: Sequence[PageRun]) -> list[Figure]:
    """The metrics of the runs while training: losses, accuracies, learning rate, speed and gradient. A metric that no
    run has is omitted."""
    figures = [
        _by_batch(runs, "loss", "Training loss", "loss, mean over the batch"),
        _by_epoch(runs, "accuracy", "Accuracy", "accuracy, %", 100, "%{y:.2f} %"),
        _by_epoch(runs, "loss", "Loss by epoch", "loss, mean over the images", 1, "%{y:.4f}"),
        _by_batch(runs, "lr", "Learning rate", "rate of the kernels", smoothed=False),
        _by_batch(runs, "images_per_second", "Speed", "images per second", from_zero=True),
        _by_batch(runs, "grad_norm", "Gradient", "norm of the gradient"),
    ]
    return [figure for figure in figures if figure is not None]


def _by_batch(
    runs: Sequence[PageRun], key: str, title: str, unit: str, *, smoothed: bool = True, from_zero: bool = False
) -> Figure | None:
    """A metric of every step. The axis is logarithmic where the line falls below a tenth of its highest value,
    as in the plots of a run folder."""
    lines: list[Row] = []
    batches: list[Row] = []  # drawn behind all lines
    alts, widths, thinned, gaps, not_recorded, spans = [], set(), set(), [], [], []
    most = min(1000, max(200, _POINTS // len(runs)))
    for number, (run, name, run_color) in enumerate(runs):
        values = _floats([row.get(key) for row in run.steps])
        finite = np.isfinite(values)
        if not finite.any():
            not_recorded += [name] if run.steps else []
            continue
        width = max(5, len(values) // 60) if smoothed and len(values) >= 20 else 1
        mean = smooth(values, width)
        kept, every = _thinned(values, most)
        spans.append((np.nanmin(values), np.nanmin(mean), np.nanmax(mean)))
        steps = [run.steps[index]["step"] for index in kept]
        line: Row = {"type": "scatter", "mode": "lines" if len(kept) > 30 else "lines+markers", "x": steps}
        if width > 1:
            color = f"{run_color} {0.35 if len(runs) <= _FEW else 0.12}"
            faint = {"y": _numbers(values[kept]), "line": {"color": color, "width": 1}, "hoverinfo": "skip"}
            batches.append({**line, **faint, "mode": "lines", "meta": {"run": number, "part": "each"}})
            widths.add(width)
        epochs = [run.steps[index]["epoch"] for index in kept]
        lines.append(
            {
                **line,
                "y": _numbers(mean[kept]),
                "customdata": [list(pair) for pair in zip(_numbers(values[kept]), _numbers(epochs), strict=True)],
                "name": _plain(name) if len(runs) > 1 else "",
                "line": {"color": run_color, "width": 2},
                "marker": {"size": 5},
                "hovertemplate": "%{customdata[0]:.4~g}"
                + (", smoothed %{y:.4~g}" if width > 1 else "")
                + ", epoch %{customdata[1]:.4~g}",
                "meta": {"run": number, "part": "mean"},
            }
        )
        alts.append(f"{name} from {values[finite][0]:.3g} to {mean[finite][-1]:.3g}")
        thinned |= {every} if every > 1 else set()
        if not finite.all():
            first = run.steps[int(np.argmin(finite))]["step"]
            gaps.append(f"{name} {int((~finite).sum()):,} times, first in batch {first:,}")
    if not lines:
        return None
    parts, caption = [], []
    if widths:
        caption.append(f"Smoothed over {_from_to(widths)} batches.")
        color = "--ink" if len(runs) > 1 else runs[0].color
        parts = [Part("mean", "smoothed", color), Part("each", "each batch", f"{color} 0.35")]
    if thinned:
        caption.append(f"Of more than {most:,} batches the lowest and highest of every {_from_to(thinned)} are drawn.")
    caption += _selection(runs) if key == "loss" else []
    caption += [f"Not finite, and a gap: {_listed(gaps)}."] if gaps else []
    caption += [f"Not recorded by {_listed(not_recorded)}."] if not_recorded else []
    layout = _layout("training batches", unit, "batch %{x:,}")
    if max(line["x"][-1] for line in lines) <= 2 * _FEW:
        layout["xaxis"]["dtick"] = 1  # plotly would take halves
    least, low, high = (pick(ends) for pick, ends in zip((min, min, max), zip(*spans, strict=True), strict=True))
    if smoothed and not from_zero and least > 0 and low < high / 10:
        layout["yaxis"] |= {"type": "log", **_ticks(low, high)}
    elif from_zero:
        layout["yaxis"]["rangemode"] = "tozero"
    alt, height = f"{title} by batch: {_listed(alts)}.", _HIGH if key == "loss" else _LOW
    return Figure(key, title, alt, batches + lines, layout, " ".join(caption), parts, height)


def _by_epoch(runs: Sequence[PageRun], metric: str, title: str, unit: str, scale: float, form: str) -> Figure | None:
    """A metric of every evaluation: on the test set, while training, and on the held-out images. scale: what its values
    are multiplied by. form: of a value in the hover box."""
    several = len(runs) > 1
    traces, alts, present = [], [], set()
    for number, (run, name, run_color) in enumerate(runs):
        epochs = [row["epoch"] for row in run.evals]
        for position, (key, label, color) in enumerate(_EVALUATED):
            values = scale * _floats([row.get(f"{key}_{metric}") for row in run.evals])
            if not np.isfinite(values).any():
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(values) < 50 else "lines",
                    "x": epochs,
                    "y": _numbers(values),
                    "name": _plain(f"{name}, {label}" if several else label),
                    "line": {"color": run_color if several else color, "dash": _DASHES[position], "width": 2},
                    "marker": {"size": 5},
                    "hovertemplate": form,
                    "meta": {"run": number, "part": key},
                }
            )
            present.add(key)
            if key == "test" and np.isfinite(values[-1]):
                alts.append(f"{name} at {values[-1]:.4g} after epoch {epochs[-1]:g}")
        last = run.evals[-1] if run.evals else {}
        if last.get(f"test_{metric}_tta") is not None:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [last["epoch"]],
                    "y": _numbers([scale * last[f"test_{metric}_tta"]]),
                    "name": _plain(f"{name}, with TTA" if several else "test with TTA"),
                    "marker": {"color": run_color if several else "--c1", "size": 10, "symbol": "diamond-open"},
                    "hovertemplate": form,
                    "meta": {"run": number, "part": "tta"},
                }
            )
            present.add("tta")
    if not traces:
        return None
    parts = [
        Part(key, label, "--ink" if several else color, dash)
        for (key, label, color), dash in zip(_EVALUATED, _DASHES, strict=False)
        if key in present
    ]
    if "tta" in present:
        parts.append(Part("tta", "test, with test-time augmentation", "--ink" if several else "--c1", "marker"))
    layout = _layout("epochs", unit, "epoch %{x:.4~g}")
    layout["xaxis"] |= _epochs(runs)
    smoothing = ", label smoothing" if metric == "loss" else ""
    caption = (
        f"Train {metric} is measured while training, with augmentation{smoothing} and dropout, over the steps since "
        f"the previous evaluation."
    )
    caption = " ".join([caption, *_selection(runs)])
    alt = f"{title}, {unit}, by epoch; on the test set {_listed(alts or ['not finite'])}."
    id, height = ("accuracy", _HIGH) if metric == "accuracy" else (f"{metric}-by-epoch", _LOW)
    return Figure(id, title, alt, traces, layout, caption if "train" in present else "", parts, height)


def _selection(runs: Sequence[PageRun]) -> list[str]:
    """Sentences on the images that runs with `train.select` were trained on."""
    names: dict[str, list[str]] = {}
    for run, name, _ in runs:
        if words := run.settings.train.select.words:
            names.setdefault(words, []).append(name)
    several = len(runs) > 1
    return [f"{_listed(by)} trained on {words}." if several else f"Trained on {words}." for words, by in names.items()]


def _epochs(runs: Sequence[PageRun]) -> Row:
    """Options of an axis of epochs, with a tick at the last."""
    last = max((row["epoch"] for run, _, _ in runs for row in run.evals), default=1)
    return {"rangemode": "tozero", "tickvals": epoch_ticks(last), "tickformat": "~g"}


def coefficients(runs: Sequence[PageRun]) -> list[Figure]:
    """The mixing coefficients of each block over the epochs, a line for each of its convolutions."""
    several = len(runs) > 1
    figures = []
    for block in range(max(len(page_run.run.settings.model.blocks) for page_run in runs)):
        bands: list[Row] = []  # drawn behind all lines
        lines: list[Row] = []
        labels: dict[int, dict[str, None]] = {}
        alts = []
        for number, (run, run_name, run_color) in enumerate(runs):
            if block >= len(run.settings.model.blocks):
                continue
            names = [conv.name for conv in run.settings.model.blocks[block].convolutions]
            rows = [row for row in run.evals if len(row.get("coefficients") or ()) > block]
            for branch, name in enumerate(names if rows else ()):
                pairs = _floats([row["coefficients"][block][branch] for row in rows])
                color = run_color if several else f"--c{branch % 7}"
                line_name = f"{run_name}, {name}" if several else name
                band, line = _band([row["epoch"] for row in rows], pairs, line_name, color, _DASHES[branch % 6])
                band["fillcolor"] = f"{color} {0.15 if len(runs) <= _FEW else 0.05}"
                band["meta"] = line["meta"] = {"run": number, "part": str(branch)}
                bands.append(band)
                lines.append(line)
                labels.setdefault(branch, {})[name] = None
                alts.append(f"{line_name} {pairs[-1, 0]:.3g}")
        if lines:
            parts = [
                Part(str(branch), " or ".join(names), "--ink" if several else f"--c{branch % 7}", _DASHES[branch % 6])
                for branch, names in labels.items()
            ]
            layout = _layout("epochs", "coefficient")
            layout["xaxis"] |= _epochs(runs)
            alt = f"Mixing coefficients of block {block + 1} by epoch; at the end {_listed(alts)}."
            figures.append(Figure(f"block{block}", f"Block {block + 1}", alt, bands + lines, layout, "", parts, 220))
    return figures


def _band(epochs: list[float], pairs: Values, name: str, color: str, dash: str) -> tuple[Row, Row]:
    """The traces of a band, of one standard deviation about the means, and of a line through the means. pairs: (epochs,
    2), mean and standard deviation."""
    mean, spread = pairs.T
    line: Row = {
        "type": "scatter",
        "mode": "lines+markers" if len(epochs) < 30 else "lines",
        "x": epochs,
        "y": _numbers(mean),
        "customdata": _numbers(spread),
        "name": _plain(name),
        "line": {"color": color, "dash": dash, "width": 2},
        "marker": {"size": 4},
        "hovertemplate": "%{fullData.name}<br>epoch %{x:.4~g}: %{y:.3f} ± %{customdata:.3f}<extra></extra>",
    }
    if len(epochs) == 1:  # a band would have no width
        line["error_y"] = {"array": _numbers(spread), "thickness": 1.5, "width": 4}
    finite = np.isfinite(mean)
    x = np.array(epochs)[finite]
    edge = np.concatenate(((mean + spread)[finite], (mean - spread)[finite][::-1]))
    band = {"x": _numbers([*x, *x[::-1]]), "y": _numbers(edge), "fill": "toself"}
    return {"type": "scatter", "mode": "none", "hoverinfo": "skip", **band}, line


def predictions(evaluation: Row, prefix: str) -> Row:
    """The last evaluation for the page: the figures `blocks`, `confusion`, `classes` and `calibration`, the pictures of
    `wrong` answers, and numbers. evaluation: of `evaluation.json`. prefix: of the figures' ids."""
    classes: list[str] = evaluation["classes"]
    confusion = np.array(evaluation["confusion"], dtype=np.int64)
    wrong = [
        {
            "png": image["png"],
            "label": classes[image["label"]],
            "predicted": classes[image["predicted"]],
            "confidence": f"{100 * image['confidence']:.1f} %",
            "index": image["index"],
        }
        for image in evaluation["wrong"]
    ]
    return {
        "tall": _rows_height(min(len(classes), _ROWS)) > 600,
        "split": evaluation["split"],
        "images": evaluation["images"],
        "errors": int(confusion.sum() - np.trace(confusion)),
        "blocks": list(_by_class(evaluation, prefix)),
        "depth": f"{_depth(evaluation):.2g}",
        "confusion": _confusion(classes, confusion, prefix),
        "classes": _per_class(classes, confusion, prefix),
        "calibration": _calibration(evaluation, prefix),
        "wrong": wrong,
    }


def _depth(evaluation: Row) -> float:
    """The largest difference between the mean of a coefficient over a class and its mean over all images."""
    blocks = evaluation["coefficients"]
    return max(float(np.abs(_floats(block["by_class"]) - _floats(block["mean"])).max()) for block in blocks)


def _by_class(evaluation: Row, prefix: str) -> Iterator[Figure]:
    """For each block the mean coefficients of the classes, coloured by their difference from the mean of all images."""
    depth = _depth(evaluation)
    for number, block in enumerate(evaluation["coefficients"]):
        names: list[str] = evaluation["classes"]
        values, mean = _floats(block["by_class"]), _floats(block["mean"])
        caption = ""
        if len(names) > _ROWS:
            caption = f"The {_ROWS} of {len(names)} classes that are furthest from the mean."
            furthest = np.sort(np.argsort(-np.abs(values - mean).max(1), kind="stable")[:_ROWS])
            names, values = [names[n] for n in furthest], values[furthest]
        difference = values - mean
        branches = [
            f"{name}, {n + 1}" if block["branches"].count(name) > 1 else name
            for n, name in enumerate(block["branches"])
        ]
        trace = {
            "type": "heatmap",
            "x": list(map(_plain, branches)),
            "y": list(map(_plain, names)),
            "z": [_numbers(row) for row in difference],
            "text": [[f"{value:.3f}" for value in row] for row in values],
            "customdata": [_numbers(mean)] * len(names),
            "zmin": -depth,
            "zmax": depth,
            "colorscale": [[0, "--low"], [0.5, "--middle"], [1, "--high"]],
            "showscale": False,
            "xgap": 2,
            "ygap": 1,
            "hovertemplate": "%{y}, %{x}<br>%{text}, of all images %{customdata:.3f}<extra></extra>",
            **_written(len(names)),
        }
        layout = _layout("", "")
        layout["xaxis"] = _categories(branches)
        layout["yaxis"] = _categories(names) | _DOWN
        place = np.unravel_index(int(np.argmax(np.abs(difference))), difference.shape)
        alt = (
            f"Coefficients of block {number + 1} by class. Furthest from the mean of all images is "
            f"{names[place[0]]} in {branches[place[1]]}: {values[place]:.3f}, where the mean is {mean[place[1]]:.3f}."
        )
        height = _rows_height(len(names))
        yield Figure(f"{prefix}-block{number}", f"Block {number + 1}", alt, [trace], layout, caption, height=height)


def _rows_height(rows: int) -> int:
    """Pixels of a figure with a row for each of so many classes."""
    return 90 + (21 if rows <= _WRITTEN else 15) * rows


def _confusion(names: list[str], confusion: npt.NDArray[np.int64], prefix: str) -> Figure:
    """How often the images of a class were taken for each class. Of many classes those with the most mistakes, of their
    own images and for them, and one column for all others."""
    errors = np.where(np.eye(len(names), dtype=bool), 0, confusion)
    frequent = [
        f"{names[i]} for {names[j]} ({confusion[i, j]:,})"
        for i, j in (divmod(int(place), len(names)) for place in np.argsort(-errors, axis=None, kind="stable")[:5])
        if errors[i, j]
    ]
    caption = f"Most often mistaken: {_listed(frequent)}." if frequent else "No image was mistaken."
    alt, columns = f"Confusion matrix of {len(names)} classes. {caption}", names
    if len(names) > _ROWS:
        mistaken = np.argsort(-(errors.sum(0) + errors.sum(1)), kind="stable")
        kept, others = np.sort(mistaken[:_CONFUSED]), mistaken[_CONFUSED:]
        confusion = np.column_stack([confusion[np.ix_(kept, kept)], confusion[np.ix_(kept, others)].sum(1)])
        caption = f"The {_CONFUSED} of {len(names)} classes with the most mistakes. {caption}"
        names = [names[n] for n in kept]
        columns = [*names, f"{len(others):,} other classes"]
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    diagonal = np.arange(len(names))[:, None] == np.arange(len(columns))
    worst = max(float(share[~diagonal].max()), 1e-9) if len(names) > 1 else 1.0
    written = _written(len(names))
    common: Row = {
        "type": "heatmap",
        "x": list(map(_plain, columns)),
        "y": list(map(_plain, names)),
        "customdata": confusion.tolist(),
        "showscale": False,
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "%{y} taken for %{x}: %{customdata:,}<br>%{z:.1f} % of the class<extra></extra>",
        **written,
    }
    traces = [
        {
            **common,
            "z": [_numbers(row) for row in np.where(mask, 100 * share, np.nan)],
            **({"text": [[f"{count:,}" if count else "" for count in row] for row in own.tolist()]} if written else {}),
            "zmin": 0,
            "zmax": 100 * most,
            "colorscale": [[0, "--middle"], [1, color]],
        }
        for mask, most, color in ((~diagonal, worst, "--high"), (diagonal, 1, "--low"))
        for own in [mask * confusion]
    ]
    layout = _layout("predicted class", "true class")
    layout["xaxis"] |= _categories(columns)
    layout["yaxis"] |= _categories(names) | _DOWN
    return Figure(f"{prefix}-confusion", "Confusion matrix", alt, traces, layout, caption, height=0)


def _per_class(names: list[str], confusion: npt.NDArray[np.int64], prefix: str) -> Figure:
    """Accuracy of each class with its interval, the best on top; of many classes, of the best and the worst."""
    counts, right = confusion.sum(1), np.diag(confusion)
    order = [int(n) for n in np.argsort(-right / np.maximum(counts, 1), kind="stable") if counts[n]]
    which = f"each of the {len(order)} classes"
    if len(order) > _ROWS:
        which = f"the {_ROWS // 2} most and the {_ROWS // 2} least accurate of {len(order)} classes"
        order = [*order[: _ROWS // 2], *order[-_ROWS // 2 :]]
    middle = 100 * right[order] / counts[order]
    ends = 100 * np.array([proportion(int(right[n]), int(counts[n])) for n in order])
    words = [
        f"{_plain(names[n])}: {right[n]:,} of {counts[n]:,} images, {mean:.1f} %<br>95 %: {low:.1f} to {high:.1f} %"
        for n, mean, (low, high) in zip(order, middle, ends, strict=True)
    ]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": _numbers(middle),
        "y": [_plain(names[n]) for n in order],
        "error_x": _bars(middle, ends),
        "customdata": words,
        "marker": {"color": "--c0", "size": 8},
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    overall = 100 * right.sum() / max(int(counts.sum()), 1)
    layout = _layout("accuracy, %", "")
    layout["yaxis"] |= _categories([names[n] for n in order]) | _DOWN
    ends_of_line = {"yref": "paper", "y0": 0, "y1": 1, "x0": overall, "x1": overall}
    layout["shapes"] = [{"type": "line", **ends_of_line, "line": {"color": "--muted", "dash": "dot"}}]
    caption = (
        f"With 95 % intervals (Wilson), of {which}; dotted: all images, {overall:.2f} %. "
        f"Best {names[order[0]]}, {middle[0]:.1f} %; worst {names[order[-1]]}, {middle[-1]:.1f} %."
    )
    height = _rows_height(len(order))
    return Figure(f"{prefix}-classes", "Accuracy by class", caption, [trace], layout, caption, height=height)


def _calibration(evaluation: Row, prefix: str) -> Figure:
    calibration = evaluation["calibration"]
    bins = [each for each in calibration["bins"] if each["count"]]
    counts = _floats([each["count"] for each in bins])
    confidence, right = (100 * _floats([each[key] for each in bins]) for key in ("confidence", "accuracy"))
    ends = 100 * np.array([proportion(round(a * n / 100), int(n)) for a, n in zip(right, counts, strict=True)])
    share = 100 * counts / counts.sum()
    width = 100 / len(calibration["bins"])
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 100],
            "y": [0, 100],
            "line": {"color": "--muted", "dash": "dot", "width": 1},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "x": _numbers(confidence),
            "y": _numbers(right),
            "error_y": _bars(right, ends),
            "customdata": counts.astype(int).tolist(),
            "marker": {"color": "--c0", "size": _numbers(5 + 13 * np.sqrt(share / share.max()))},
            "hovertemplate": "%{customdata:,} images: confidence %{x:.1f} %, accuracy %{y:.1f} %<extra></extra>",
        },
        {
            "type": "bar",
            "x": [100 * each["from"] + width / 2 for each in bins],
            "y": _numbers(share),
            "width": [0.9 * width] * len(bins),
            "yaxis": "y2",
            "customdata": counts.astype(int).tolist(),
            "marker": {"color": "--c0 0.4"},
            "hovertemplate": "%{customdata:,} images, %{y:.1f} %<extra></extra>",
        },
    ]
    layout = _layout("confidence, %", "accuracy, %")
    layout["xaxis"] |= {"range": [0, 102], "anchor": "y2"}
    layout["yaxis"] |= {"range": [0, 105], "domain": [0.3, 1]}
    layout["yaxis2"] = {**_axis("images, %"), "domain": [0, 0.2], "rangemode": "tozero", "nticks": 3}
    average, accuracy = (float((values * share).sum() / 100) for values in (confidence, right))
    verdict = "overconfident" if average > accuracy else "underconfident"
    caption = (
        f"Expected calibration error {100 * calibration['ece']:.1f} %: the mean confidence is {average:.1f} % "
        f"and the accuracy {accuracy:.1f} %: {verdict}. On the dotted line both are equal; bars are 95 % "
        f"intervals (Wilson). Below, the share of the images by confidence."
    )
    return Figure(f"{prefix}-calibration", "Calibration", caption, traces, layout, caption, height=330)


def _written(classes: int) -> Row:
    """Trace options that write a heat map's text into its cells, where there is room."""
    return {"texttemplate": "%{text}", "textfont": {"size": 11 if classes <= 12 else 9}} if classes <= _WRITTEN else {}


def _bars(middle: Values, ends: Values) -> Row:
    """Error bars from the middles, (N), to both ends of intervals, (N, 2)."""
    up, down = ends[:, 1] - middle, middle - ends[:, 0]
    style = {"color": "--c0 0.6", "thickness": 1.5, "width": 0}
    return {"type": "data", "symmetric": False, "array": _numbers(up), "arrayminus": _numbers(down), **style}


def _ticks(low: float, high: float) -> Row:
    """Ticks of a logarithmic axis, finer where it spans fewer decades."""
    decades = math.log10(high / low)
    digits = (1, 1.5, 2, 3, 5, 7) if decades < 2 else (1, 2, 5) if decades < 4 else (1,)
    values = [digit * 10.0**power for power in range(-9, 10) for digit in digits]
    return {"tickvals": values, "ticktext": [f"{value:.2g}" for value in values]}


def _layout(x: str, y: str, over: str = "") -> Row:
    """Options of a figure with these titles of its axes. over: the title of a hover box with the values of all lines at
    an x; empty: the hover box is for the nearest point alone."""
    across, hover = _axis(x), "closest"
    if over:
        across |= {"unifiedhovertitle": {"text": over}, "spikecolor": "--muted", "spikedash": "solid"}
        across["spikethickness"], hover = -1, "x unified"  # negative: without an outline
    return {"xaxis": across, "yaxis": _axis(y), "showlegend": False, "hovermode": hover}


def _axis(title: str) -> Row:
    colors = {"gridcolor": "--grid", "zerolinecolor": "--grid", "linecolor": "--grid", "tickcolor": "--grid"}
    words = {"title": {"text": title, "standoff": 8}, "exponentformat": "none", "separatethousands": True}
    return {**colors, **words, "automargin": True}


def _categories(names: Sequence[str]) -> Row:
    """Options of an axis of names, of which the page writes as many as there is room for."""
    text = [_plain(name if len(name) <= 20 else f"{name[:19]}…") for name in names]
    ticks = {"tickvals": list(map(_plain, names)), "ticktext": text, "ticks": "", "automargin": True}
    return {**ticks, "type": "category", "showgrid": False, "zeroline": False}


def _thinned(values: Values, most: int) -> tuple[list[int], int]:
    """The indices of the values that are drawn, and the length of a section: all and 1; or, of more than `most` values,
    the lowest, the highest and the first that is not finite of each section, and the first and last of all."""
    if len(values) <= most:
        return list(range(len(values))), 1
    every = math.ceil(2 * len(values) / most)
    kept = {0, len(values) - 1}
    for start in range(0, len(values), every):
        part = values[start : start + every]
        finite = np.isfinite(part)
        if finite.any():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        if not finite.all():
            kept.add(start + int(np.argmin(finite)))
    return sorted(kept), every


def _floats(values: object) -> Values:
    """An array with nan for None."""
    return np.array(values, dtype=np.float64)


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Values with five digits, more than a screen can show; None for those that are not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _plain(text: str) -> str:
    """Text for plotly, which reads HTML, but leaves the entities of quotes as they are."""
    return escape(text, quote=False)


def _from_to(values: set[int]) -> str:
    return " to ".join(f"{value:,}" for value in sorted({min(values), max(values)}))


def _listed(words: Sequence[str]) -> str:
    """A, B and C; of more than six the first five, and the number of the others."""
    if len(words) > 6:
        words = [*words[:5], f"{len(words) - 5} more"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
