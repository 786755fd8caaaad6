"""One or several runs as one HTML page that opens anywhere, without a server and without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dist_train import config
from dist_train.errors import UserError
from dist_train.reports import architecture, drawing, figures
from dist_train.reports.data import Data, samples
from dist_train.reports.groups import NAMED, Group, PageRun, names, read
from dist_train.reports.statistics import interval, proportion
from dist_train.reports.table import IMAGES
from dist_train.runs.layout import EVALUATION, SETTINGS
from dist_train.runs.metrics import Row
from dist_train.runs.run import Run

GENERATOR = '<meta name="generator" content="dist-train report">'  # by which the command knows its own pages
_LABELS = {
    "code": "digest of the code",
    "instructions": "CPU instructions",
    "git_commit": "commit",
    "host": "hosts",
    "world_size": "ranks",
}


def page(paths: Sequence[Path], title: str, command: Sequence[str]) -> tuple[str, list[UserError]]:
    """The page as HTML, and the errors of runs that are damaged and therefore not on it.

    paths: run folders and groups. title: empty for the runs' names. command: the command line that creates the page.
    Raises UserError."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    groups, keys, unfinished, damaged = read(paths)
    runs = [page_run for group in groups for page_run in group.runs]
    curves, coefficients = figures.curves(runs), figures.coefficients(runs)
    panels = [
        {"run": number, "name": name, **figures.predictions(run.evaluation, f"run{number}")}
        for number, (run, name, _) in enumerate(runs)
        if run.evaluation is not None
    ]
    table = [_configuration_row(group, keys) for group in groups]
    all_figures = [*curves, *coefficients]
    for panel in panels:
        all_figures += [*panel["blocks"], panel["confusion"], panel["classes"], panel["calibration"]]
    sources = Path(__file__).parent
    scripts = [get_plotlyjs(), (sources / "report.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(sources),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    data = [Data(page_run.run) for page_run in runs]
    text = environment.get_template("report.html").render(
        title=title or (paths[0].resolve().name if len(paths) == 1 and len(runs) > 1 else names(runs)),
        made=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        lead=_lead(groups),
        facts=_facts(groups, data),
        samples=samples(data),
        groups=groups,
        runs=runs,
        table=table,
        tta=any(row["accuracies"][1] for row in table),
        intervals={cell["kind"] for row in table for cell in row["accuracies"] if cell},
        run_rows=[_run_row(page_run) for page_run in runs],
        notes=_notes(groups, keys, unfinished),
        curves=curves,
        coefficients=coefficients,
        architectures=_architectures(runs),
        panels=panels,
        keys=keys,
        settings=[_settings(group) for group in groups],
        environment=_environment(runs),
        history=[_event(name, row) for run, name, _ in runs for row in run.history],
        commands=_commands(runs, command),
        figures={each.id: {"data": each.traces, "layout": each.layout} for each in all_figures},
        style=Markup((sources / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        generator=Markup(GENERATOR),
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )
    return text, damaged


def _lead(groups: Sequence[Group]) -> str:
    """The result in one sentence."""
    finished = [group for group in groups if group.done]
    if len(groups) == 1 and finished:
        group = groups[0]
        cell, tta = _accuracy(group, "test_accuracy"), _accuracy(group, "test_accuracy_tta")
        seconds = statistics.mean(group.row.results("train_seconds"))
        if cell is None:
            return "Finished without a test accuracy."
        with_tta = f" ({tta['mean']} % with test-time augmentation)" if tta else ""
        if group.done == 1:
            epochs = group.runs[0].run.settings.train.epochs
            after = f"after {_epochs(epochs)}, in {_duration(seconds)} of training"
            return f"Test accuracy {cell['mean']} %{with_tta} {after}."
        return (
            f"Test accuracy {cell['mean']} %{with_tta} as the mean of {group.done} runs, "
            f"95 % interval {cell['interval']} %; {_duration(seconds)} of training each."
        )
    if finished:
        means = sorted(statistics.mean(group.row.results("test_accuracy")) for group in finished)
        low, high = (f"{100 * mean:.2f} %" for mean in (means[0], means[-1]))
        spans = f"mean test accuracy from {low} to {high}" if len(means) > 1 else f"test accuracy {high}, one finished"
        return f"{len(groups)} configurations in {sum(len(group.runs) for group in groups)} runs: {spans}."
    runs = [page_run for group in groups for page_run in group.runs]
    so_far = [f"{page_run.name} is {_progress(page_run.run)}" for page_run in runs]
    return f"Not finished: {'; '.join(so_far[:NAMED])}{f'; and {len(runs) - NAMED} more' * (len(runs) > NAMED)}."


def _progress(run: Run) -> str:
    """The progress of an unfinished run."""
    if not run.steps:
        return "at its start"
    words = f"at epoch {run.steps[-1]['epoch']:.3g} of {run.settings.train.epochs:g}"
    for row in [row for row in run.evals if row["test_accuracy"] is not None][-1:]:
        words += f", {100 * row['test_accuracy']:.2f} % on the test set after epoch {row['epoch']:g}"
    return words


def _facts(groups: Sequence[Group], data: Sequence[Data]) -> list[tuple[str, list[str]]]:
    """The facts below the title, as pairs of a heading and lines. data: of each run."""
    runs = [page_run.run for group in groups for page_run in group.runs]

    def few(lines: Iterable[str]) -> list[str]:
        different = list(dict.fromkeys(lines))
        return different[:NAMED] + ([f"and {len(different) - NAMED} more"] if len(different) > NAMED else [])

    def all_of(words: Callable[[Run], str]) -> list[str]:
        return few(map(words, runs))

    def network(run: Run) -> str:
        blocks = run.settings.model.blocks
        same = next(group.row for group in groups if run in group.row.runs)
        sizes = [f"{number:,} parameters" for number in same.results("parameters")[:1]]
        sizes += [f"{number / 1e6:,.4g} M FLOPs per image" for number in same.results("flops_per_image")[:1]]
        branches = _counted(sum(len(block.convolutions) for block in blocks), "convolution")
        return ", ".join([_counted(len(blocks), "block"), branches, *sizes])

    def training(run: Run) -> str:
        t = run.settings.train
        chosen = f" ({t.select.words})" if t.select.words else ""
        return f"{_epochs(t.epochs)} in batches of {t.batch_size:,} images{chosen}, {t.precision}"

    def machine(run: Run) -> str:
        on = f" on {run.device}" if run.device else ""
        return f"{_counted(run.ranks, 'rank')}{on}" if run.ranks else "not recorded"

    seeds = [str(run.settings.train.seed) for run in runs]
    return [
        ("Data", few(each.images for each in data)),
        ("Network", all_of(network)),
        ("Training", all_of(training)),
        ("Seeds" if len(set(seeds)) > 1 else "Seed", [", ".join(dict.fromkeys(seeds))]),
        ("Computed by", all_of(machine)),
        ("Classes", few(each.names for each in data)),
    ]


def _configuration_row(group: Group, keys: Sequence[str]) -> Row:
    """The row of a configuration in the table of results, with all numbers as text. keys: the settings in which the
    configurations differ."""
    runs, results = group.runs, group.row.results

    def mean(key: str, form: Callable[[float], str]) -> str:
        values = results(key)
        return form(statistics.mean(values)) if values else ""

    return {
        "color": runs[0].color,
        "name": group.name,
        "differs": [f"{key} = {value or 'none'}" for key, value in zip(keys, group.row.values, strict=True)],
        "n": str(group.done) if group.done == len(runs) else f"{group.done} of {len(runs)}",
        "accuracies": [_accuracy(group, key) for key in ("test_accuracy", "test_accuracy_tta")],
        "seconds": mean("train_seconds", lambda value: f"{value:,.1f}"),
        "rate": mean("images_per_second", lambda value: f"{value:,.0f}"),
        "mfu": mean("mfu", lambda value: f"{100 * value:.1f} %"),
        "parameters": mean("parameters", lambda value: f"{value:,.0f}"),
    }


def _accuracy(group: Group, key: str) -> dict[str, str] | None:
    """A cell: mean, standard deviation and 95 % interval in percent, of the runs or images that are named in `of`;
    kind: of the interval. None where no run has the metric."""
    values = group.row.results(key)
    if not values:
        return None
    mean = statistics.mean(values)
    cell = {"mean": f"{100 * mean:.2f}", "deviation": "", "interval": "", "of": "", "kind": ""}
    if len(values) > 1:
        half = interval(values)
        ends, of, kind = (mean - half, mean + half), f"over {len(values)} runs", "t"
        cell["deviation"] = f"{100 * statistics.stdev(values):.2f}"
    else:
        run = next(run for run in group.row.runs if run.summary.get(key) is not None)
        images = _tested(run)
        if images is None:
            return cell
        ends, of, kind = proportion(round(mean * images), images), f"of {images:,} images", "Wilson"
    return {**cell, "interval": f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}", "of": f"{of} ({kind})", "kind": kind}


def _tested(run: Run) -> int | None:
    """The number of test images, None where it is not recorded."""
    if run.evaluation is None or run.evaluation["split"] != "test":
        return None
    return int(run.evaluation["images"])


def _run_row(page_run: PageRun) -> Row:
    """The row of a run in the table of all runs."""
    run, accuracies = page_run.run, ("test_accuracy", "test_accuracy_tta", "val_accuracy", "train_accuracy")

    def number(key: str, form: Callable[[float], str]) -> str:
        value = run.summary.get(key)
        return "" if value is None else form(value)

    return {
        "color": page_run.color,
        "name": page_run.name,
        "seed": str(run.settings.train.seed),
        "state": "done" if run.done else f"{run.state}, {_progress(run)}",
        "accuracies": [number(key, lambda value: f"{100 * value:.2f}") for key in accuracies],
        "seconds": number("train_seconds", lambda value: f"{value:,.1f}"),
        "rate": number("images_per_second", lambda value: f"{value:,.0f}"),
        "mfu": number("mfu", lambda value: f"{100 * value:.1f} %"),
        "ranks": str(run.ranks or ""),
        "weights": run.summary.get("weights_sha256", "")[:12],
    }


def _notes(groups: Sequence[Group], keys: Sequence[str], unfinished: Sequence[str]) -> list[str]:
    """Sentences about missing data, and for the interpretation of the results."""
    runs = [page_run for group in groups for page_run in group.runs]
    notes = [f"Not finished: {', '.join(unfinished)}."] if unfinished else []
    if without := [page_run for page_run in runs if page_run.run.done and page_run.run.evaluation is None]:
        folder = shlex.quote(str(without[0].run.folder)) if len(without) == 1 else "RUN"
        notes.append(
            f"Without {EVALUATION}, and so without confusion matrix, calibration and pictures: {names(without)}; "
            f"dist-train evaluate {folder} --write creates it."
        )
    evaluated = [page_run for page_run in runs if page_run.run.evals]
    if without := [page_run for page_run in evaluated if not any("coefficients" in row for row in page_run.run.evals)]:
        notes.append(f"No mixing coefficients were recorded by {names(without)}.")
    for count in sorted({page_run.run.summary.get("equal_images") or 0 for page_run in runs} - {0}):
        same = [page_run for page_run in runs if page_run.run.summary.get("equal_images") == count]
        notes.append(f"{count:,} of the test images of {names(same)} have the pixels of training images.")
    if IMAGES in keys:
        notes.append(
            "Runs with the same settings were trained on different images, by the SHA-256 of the data set: they are "
            "separate configurations, and their results are not averaged."
        )
    for group in groups:
        done = [page_run for page_run in group.runs if page_run.run.done]
        seeds = Counter(page_run.run.settings.train.seed for page_run in done)
        for seed in (seed for seed, count in seeds.items() if count > 1):
            twice = [page_run for page_run in done if page_run.run.settings.train.seed == seed]
            notes.append(
                f"{names(twice)} have the same configuration and the same seed {seed}, but are counted as "
                f"{len(twice)} runs: the interval over seeds is too narrow."
            )
    return notes


def _architectures(runs: Sequence[PageRun]) -> list[Row]:
    """Each distinct architecture as a drawing and as a table, with the runs that have it; a reason in place of both
    where the shape of its images is not known."""
    from markupsafe import Markup

    by_key: dict[str, list[PageRun]] = {}
    for page_run in runs:
        settings = page_run.run.settings
        key = json.dumps([config.to_dict(settings)["model"], settings.data.dataset, str(settings.data.dir)])
        by_key.setdefault(key, []).append(page_run)
    drawn: dict[tuple[str, str], tuple[list[PageRun], list[architecture.Layer]]] = {}
    for same in by_key.values():
        settings = same[0].run.settings
        try:
            image_shape, classes = architecture.images(settings.data, None, None)
            svg = drawing.svg(settings.model, image_shape, classes)
            its_runs, _ = drawn.setdefault((svg, ""), ([], architecture.layers(settings.model, image_shape, classes)))
        except UserError:
            reason = f"not drawn: {settings.data.dir} does not have the size of its images and the number of classes"
            its_runs, _ = drawn.setdefault(("", reason), ([], []))
        its_runs += same
    return [
        {
            "names": names(same) if len(drawn) > 1 else "",
            "svg": Markup(svg),
            "reason": reason,
            "layers": [
                {
                    "part": "" if number and rows[number - 1].part == row.part else row.part,
                    "name": row.name.replace("->", "→"),
                    "shape": " x ".join(map(str, row.shape)),
                    "parameters": f"{row.parameters:,}" if row.parameters else "",
                    "flops": f"{row.flops:,}" if row.flops else "",
                }
                for number, row in enumerate(rows)
            ],
        }
        for (svg, reason), (same, rows) in drawn.items()
    ]


def _settings(group: Group) -> Row:
    """A configuration, as in the folder of its first run."""
    first, *others = group.runs
    seeds = ", ".join(f"{page_run.run.settings.train.seed} ({page_run.name})" for page_run in others)
    return {
        "color": first.color,
        "name": group.name,
        "values": [value or "none" for value in group.row.values],
        "path": str(first.run.folder / SETTINGS),
        "others": f"Of {first.name}. The others differ in nothing but train.seed: {seeds}." if others else "",
        "toml": (first.run.folder / SETTINGS).read_text(encoding="utf-8"),
    }


def _environment(runs: Sequence[PageRun]) -> list[Row]:
    """The environments of the runs: by name the values, each with its runs where not all have it."""
    table: dict[str, dict[str, list[PageRun]]] = {}
    for page_run in runs:
        summary = page_run.run.summary
        values_of: dict[str, list[Any]] = {
            "device": [],
            **{name: [value] for name, value in summary.get("versions", {}).items()},
            "git_commit": [(summary.get("git_commit") or "")[:12] or None],
            "world_size": [],
            "host": [row.get("host") for row in page_run.run.starts],
            **page_run.run.environment(),
        }
        for name, values in values_of.items():
            text = ", then ".join(dict.fromkeys(str(value) for value in values if value is not None))
            if text:
                table.setdefault(name, {}).setdefault(text, []).append(page_run)

    def with_runs(value: str, same: list[PageRun]) -> Row:
        return {"value": value, "runs": names(same) if len(same) < len(runs) else ""}

    return [
        {"name": _LABELS.get(name, name), "values": [with_runs(*each) for each in values.items()]}
        for name, values in table.items()
    ]


def _event(name: str, row: Row) -> Row:
    """A line of `history.jsonl` as a row of the table of events. name: of its run."""
    shown_elsewhere = ("event", "time", "environment", "ranks", "images")
    others = {key: value for key, value in row.items() if key not in shown_elsewhere}
    step = others.pop("step", None)
    if row["event"] == "start":
        ranks, host = others.pop("world_size", None), others.pop("host", "")
        words = f"started on {_counted(ranks, 'rank')}{f' of {host}' if host else ''}" if ranks else "started"
        changed = others.pop("changed", {})
        words += "".join(f"; {name} was {before}, is {now}" for name, (before, now) in changed.items())
    elif row["event"] == "end":
        reason = others.pop("reason", "")
        words = f"ended: {others.pop('outcome', '')}{f', {reason}' if reason else ''}"
    else:
        words = str(row["event"]).replace("_", " ")
    more = ", ".join(f"{key} {value}" for key, value in others.items())
    return {
        "run": name,
        "time": str(row.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
        "step": "" if step is None else f"{step:,}",
        "words": f"{words} ({more})" if more else words,
    }


def _commands(runs: Sequence[PageRun], command: Sequence[str]) -> list[Row]:
    """Commands to train, resume and compare the runs and to create the page, with their purposes."""

    def train(run: Run, into: str) -> str:
        start = f"torchrun --standalone --nproc_per_node={run.ranks}" if (run.ranks or 1) > 1 else "python"
        paths = shlex.join(["--config", str(run.folder / SETTINGS), "--run-dir", into])
        return f"{start} -m dist_train.main {paths}"

    commits = [*{commit: None for page_run in runs if (commit := page_run.run.summary.get("git_commit"))}]
    done, others = ([page_run.run for page_run in runs if page_run.run.done is wanted] for wanted in (True, False))
    commands = []
    if done:
        code = f", with the code of commit {commits[0][:12]}" if len(commits) == 1 else ""
        words = f"Train again, on any number of ranks to the same weights{code}; then compare:"
        lines = [train(run, f"{run.folder}-again") for run in done]
        compare = ["dist-train", "diff", str(done[0].folder), f"{done[0].folder}-again"]
        commands.append({"for": words, "lines": [*lines, shlex.join(compare)]})
    if others:
        lines = [train(run, str(run.folder)) for run in others]
        commands.append({"for": "Resume the unfinished runs:", "lines": lines})
    return [*commands, {"for": "Create this page again:", "lines": [shlex.join(command)]}]


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'s' * (number != 1)}"


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
