"""Compares variants of a configuration on held-out training images: trains each with several seeds, and prints a table.

    python -m benchmarks.recipe FILE [--out DIR] [--ranks N] [--results FILE] [key=value ...]

FILE is a TOML file, such as benchmarks/recipes/controls.toml:

    preset = "block94"       # or config = "FILE.toml", beside this file; as --preset and --config of the trainer
    width = 0.5              # factor on the channels of every block and of a learned stem; groups stay (default: 1)
    seeds = [0, 1, 2]

    [settings]               # of all variants, by the names of config.toml; the last part is enough, as in a command
    data.holdout = 10000     # images held out, which choose; required
    epochs = 8

    [[variants]]             # the first is the one that the others are compared with
    name = "3x3 and 1x1"

    [[variants]]
    name = "3x3"
    settings = { model.blocks.1.convolutions = [{ kernel = 3 }], optim.mixing.lr = 0.02 }
    width = 0.25             # in place of the recipe's

key=value are settings of all variants over those of FILE.

Every variant and seed is a run of the trainer, in the folder DIR/VARIANT-seedSEED (default: runs/NAME_OF_FILE). All
variants are trained with the first seed, then all with the next. Runs that are done are not trained again, and one that
was interrupted resumes: after Ctrl-C, SIGTERM or a crash start the same command again. A variant whose training fails
does not stop the others. More seeds or variants in FILE add runs to those that are there.

The table has the accuracy on the held-out images and, where evaluate.tta is set, with test-time augmentation; and the
differences to the first variant, paired by seed, with their 95 % intervals by Student's t. "Visible from" is half of
such an interval: a smaller difference could not have been told from none. It is appended to --results (default:
DIR/results.md) where a run has been trained. Test images are not read for it; the trainer evaluates on them as always.
Exit codes are those of the trainer: 0 done, 1 a training failed, 2 bad input, 75 stopped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks import arguments
from benchmarks.table import append, command
from dist_train import config
from dist_train.command_line import Parser, positive
from dist_train.command_line import command as answers_bad_input
from dist_train.config.arguments import parser, resolve
from dist_train.config.effects import check_effects
from dist_train.data import dataset
from dist_train.distributed.launcher import without_launcher
from dist_train.errors import BAD_INPUT, DONE, FAILED, PREEMPTED, UserError, say, show
from dist_train.launch.node import JobNode, as_name, local_ranks, start_ranks
from dist_train.model.shapes import check_shapes
from dist_train.reports.markdown import literal, table
from dist_train.reports.statistics import interval, spread
from dist_train.runs.run import Run
from dist_train.signals import StopRequest

_ABSENT = "not yet"
# keys of summary.json: title, factor and decimals
_MEASURES = {
    "val_loss": ("held-out loss", 1, 4),
    "val_accuracy": ("held out, %", 100, 2),
    "val_accuracy_tta": ("held out with TTA, %", 100, 2),
}


_Width = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    settings: dict[str, Any] = {}


class _Variant(_Table):
    name: Annotated[str, Field(pattern="[A-Za-z0-9]")]
    width: _Width | None = None


class _Recipe(_Table):
    preset: str | None = None
    config: str | None = None
    width: _Width = 1.0
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]
    variants: Annotated[list[_Variant], Field(min_length=1)]


@dataclass(frozen=True)
class Variant:
    """A variant of the recipe. arguments: of the trainer, but for seed and run folder. folders: of the runs, by seed,
    in the recipe's order."""

    name: str
    arguments: list[str]
    settings: config.Config
    folders: dict[int, Path] = field(default_factory=dict)

    @property
    def runs(self) -> list[Run]:
        """The runs as they are now."""
        return [*map(Run, self.folders.values())]

    def results(self, key: str) -> dict[int, Any]:
        """The values of a key in the summaries of the runs that are done and have it, by seed."""
        found = {seed: Run(folder).summary.get(key) for seed, folder in self.folders.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def read(path: Path, out: Path, more: list[str]) -> list[Variant]:
    """The variants in a recipe, whose runs lie in the folder `out`. more: settings of all, as key=value. Raises
    UserError for everything that the trainer would refuse, before anything is trained."""
    tree = config.read_toml(path, "")
    try:
        recipe = _Recipe.model_validate(tree)
    except ValidationError as error:
        # a wrong name, which explains a missing setting, before others
        first = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}; correct it") from None
    if len(set(recipe.seeds)) < len(recipe.seeds):
        raise UserError(f"{path}: seeds = {recipe.seeds}: a seed is given twice; remove one")
    variants: dict[str, Variant] = {}
    for given in recipe.variants:
        folder = as_name(given.name)
        if folder in variants:
            raise UserError(f"{path}: variants: two would have the folder {folder}; give one another name")
        arguments = [f"--preset={recipe.preset}"] if recipe.preset else []
        arguments += [f"--config={path.parent / recipe.config}"] if recipe.config else []
        own = [*_settings(recipe.settings), *_settings(given.settings), *more]
        try:
            width = recipe.width if given.width is None else given.width
            variant = _variant(given.name, arguments, own, width)
        except UserError as error:
            raise UserError(f"{path}: variant {given.name}: {error}") from None
        variant.folders.update({seed: out / f"{folder}-seed{seed}" for seed in recipe.seeds})
        variants[folder] = variant
    _check(path, [*variants.values()])
    return [*variants.values()]


def _settings(tables: dict[str, Any], key: str = "") -> Iterator[str]:
    """The settings in nested tables as key=value."""
    for name, value in tables.items():
        place = f"{key}.{name}" if key else name
        if isinstance(value, dict):
            yield from _settings(value, place)
        else:
            yield f"{place}={_inline(value)}"


def _inline(value: Any) -> str:
    """A value as TOML in one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_inline(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)  # strings, numbers and truth values are as in TOML


def _variant(name: str, arguments: list[str], own: list[str], width: float) -> Variant:
    """A variant of this width, without its runs. own: its settings. Raises UserError."""
    given = parser().parse_intermixed_args([*arguments, *own])
    _, settings = resolve(given)
    if "train.seed" in config.given(None, own):
        raise UserError("train.seed: the seeds are those of the recipe; remove this one")
    if not settings.data.holdout:
        raise UserError("data.holdout = 0: variants are compared on images that are held out; set it, such as to 5000")
    check_effects(settings, config.given(given.config, own))
    scaled = {f"model.blocks.{number}": block.channels for number, block in enumerate(settings.model.blocks)}
    if settings.model.stem.kind == "conv":
        scaled["model.stem"] = settings.model.stem.channels
    for key, channels in scaled.items():
        if not (channels * width).is_integer():
            raise UserError(f"width = {width:g} makes {channels * width:g} of {key}.channels = {channels}; use another")
    if width != 1:
        own = [*own, *(f"{key}.channels={int(channels * width)}" for key, channels in scaled.items())]
    arguments = [*arguments, *own, "record.quiet=true"]
    _, settings = resolve(parser().parse_intermixed_args(arguments))
    return Variant(name, arguments, settings)


def _check(path: Path, variants: list[Variant]) -> None:
    """Raises UserError for variants that cannot be compared or trained, and for runs of other settings. Writes the
    betons where they are missing."""
    first = variants[0].settings.data
    for variant in variants:
        settings, data = variant.settings, variant.settings.data
        if (data.dataset, data.folder, data.holdout) != (first.dataset, first.folder, first.holdout):
            raise UserError(
                f"{path}: variant {variant.name}: its held-out images are not those of the first variant; give all the "
                f"same data.dataset, data.dir and data.holdout"
            )
        manifest = dataset.prepare(data)
        dataset.check_images(data, manifest, settings.train.batch_size)
        try:
            check_shapes(settings, manifest.image_shape)
        except UserError as error:
            raise UserError(f"{path}: variant {variant.name}: {error}") from None
        for seed, folder in variant.folders.items():
            _, of_seed = resolve(parser().parse_intermixed_args([*variant.arguments, f"seed={seed}"]))
            config.check_folder(folder, of_seed)


def train(variants: list[Variant], ranks: int | None, stop: StopRequest) -> tuple[int, int]:
    """Train what is not done: all variants with the first seed, then all with the next. Returns the exit code, and how
    many runs have been finished."""
    code, finished = DONE, 0
    runs = [(variant, seed, variant.folders[seed]) for seed in variants[0].folders for variant in variants]
    for number, (variant, seed, folder) in enumerate(runs, 1):
        if Run(folder).done:
            continue
        show(f"{number} of {len(runs)}: {variant.name}, seed {seed}: {folder}")
        node = JobNode(0, 1, len(os.sched_getaffinity(0)), "alone")
        per_node = ranks or local_ranks(variant.settings.train, 1, node.cpus)
        arguments = [*variant.arguments, f"train.seed={seed}", f"--run-dir={folder}"]
        variables = {"OMP_NUM_THREADS": str(variant.settings.train.threads), **without_launcher()}
        # a session of its own: a terminal's Ctrl-C reaches this process alone, which passes one signal on
        process = subprocess.Popen(
            start_ranks(arguments, per_node, node), env=variables, stdout=subprocess.DEVNULL, start_new_session=True
        )
        ended = _wait(process, stop)
        if summary := Run(folder).summary:
            finished += 1
            accuracy, seconds = 100 * summary["val_accuracy"], summary["train_seconds"]
            show(f"    {accuracy:.2f} % of the held-out images, {seconds:,.0f} s of training")
        if stop.received:
            return PREEMPTED, finished
        if ended == BAD_INPUT:
            return ended, finished
        if not summary:
            say(f"{variant.name}, seed {seed}: the training has failed, with exit code {ended}; the others continue")
            code = FAILED
    return code, finished


def _wait(process: subprocess.Popen[bytes], stop: StopRequest) -> int:
    """Wait for the end of a training, which is asked to stop once this process is. Returns its exit code."""
    asked = False
    try:
        while True:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop.received and not asked:
                    process.terminate()
                    asked = True
    finally:
        if process.poll() is None:  # after a second Ctrl-C
            process.kill()


def tables(variants: list[Variant]) -> str:
    """The results as Markdown: of each variant, and its differences to the first."""
    measures = {key: how for key, how in _MEASURES.items() if any(variant.results(key) for variant in variants)}
    operations = [_mean(variant.results("train_flops").values()) for variant in variants]
    rows = []
    for variant, flops in zip(variants, operations, strict=True):
        done = len(variant.results("train_seconds"))
        count = len(variant.folders)
        cells = [literal(variant.name), f"{done}" if done == count else f"{done} of {count}"]
        for key, (_, factor, digits) in measures.items():
            cells.append(spread([factor * value for value in variant.results(key).values()], digits) or _ABSENT)
        cells.append(f"{flops / operations[0]:.3f}" if flops and operations[0] else _ABSENT)
        seconds = _mean(variant.results("train_seconds").values())
        rows.append([*cells, f"{seconds:,.1f}" if seconds else _ABSENT])
    header = ["variant", "n", *(title for title, *_ in measures.values()), "operations", "training, s"]
    text = table(header, rows)
    if operations[0]:
        text += f"\nOperations are those of a training; the first variant's are {operations[0]:.3g}.\n"
    if variants[1:] and measures:
        header = [f"minus {literal(variants[0].name)}", "pairs"]
        header += [cell for title, *_ in measures.values() for cell in (title, "visible from")]
        text += "\n" + table(header, [_differences(variants[0], variant, measures) for variant in variants[1:]])
    runs = [run for variant in variants for run in variant.runs if not run.done]
    if runs:
        begun = [f"{literal(run.folder.name)} {run.state}" for run in runs if run.begun]
        count = sum(len(variant.folders) for variant in variants)
        text += f"\nNot done: {len(runs)} of {count} runs{''.join(f'; {each}' for each in begun)}\n"
    return text.rstrip()


def _differences(first: Variant, variant: Variant, measures: dict[str, tuple[str, int, int]]) -> list[str]:
    """The row of a variant in the table of differences."""
    cells, pairs = [], 0
    for key, (_, factor, digits) in measures.items():
        of_first, own = first.results(key), variant.results(key)
        differences = [factor * (own[seed] - of_first[seed]) for seed in own if seed in of_first]
        pairs = max(pairs, len(differences))
        half = interval(differences) if differences else math.inf
        if not differences:
            cells += [_ABSENT, _ABSENT]
        elif math.isinf(half):
            cells += [f"{statistics.mean(differences):+.{digits}f}", "one pair"]
        else:
            mean = statistics.mean(differences)
            ends = f"{mean - half:+.{digits}f} to {mean + half:+.{digits}f}"
            cells += [f"**{mean:+.{digits}f}** (95 %: {ends})", f"{half:.{digits}f}"]
    return [literal(variant.name), str(pairs), *cells]


def _mean(values: Iterable[float]) -> float | None:
    found = [*values]
    return statistics.mean(found) if found else None


def conditions(variants: list[Variant]) -> str:
    """Day, commits, hardware and versions of the runs that are done, in one line."""
    done = [run.summary for variant in variants for run in variant.runs if run.done]
    if not done:
        return f"{time.strftime('%Y-%m-%d')}; no run is done"

    def each(values: Iterable[str]) -> str:
        return " and ".join(dict.fromkeys(values))

    commits = [summary["git_commit"] or "none" for summary in done]
    ranks = each(str(summary["world_size"]) for summary in done)
    parts = [
        time.strftime("%Y-%m-%d"),
        f"commit {each(commit[:7] + '+' * commit.endswith('+') for commit in commits)}",
        f"{each(summary['device'] for summary in done)}, {ranks} rank{'s' * (ranks != '1')}",
        *(f"{name} {each(summary['versions'][name.lower()] for summary in done)}" for name in ("torch", "Python")),
    ]
    return "; ".join(parts)


def _parser() -> Parser:
    parser = arguments.parser("recipe", __doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="the recipe, a TOML file")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the runs (default: runs/NAME_OF_FILE)")
    parser.add_argument("--ranks", metavar="N", type=positive, help="ranks of a run (default: all GPUs, or else cores)")
    parser.add_argument(
        "--results", metavar="FILE", type=arguments.table_file, help="append the table here (default: DIR/results.md)"
    )
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings of all variants over those of FILE")
    return parser


@answers_bad_input
def main() -> int:
    args = _parser().parse_intermixed_args()
    out = args.out or Path("runs") / args.file.stem
    variants = read(args.file, out, args.settings)
    try:
        with StopRequest() as stop:
            code, finished = train(variants, args.ranks, stop)
    except KeyboardInterrupt:  # a second Ctrl-C
        return 130
    if code == BAD_INPUT:  # the trainer has said why
        return code
    text = f"{conditions(variants)}\n\n```bash\n{command('benchmarks.recipe')}\n```\n\n{tables(variants)}"
    show(*text.split("\n"))
    if finished:
        append(args.results or out / "results.md", text)
    if stop.received:
        say("stopped; the same command continues")
    return code


if __name__ == "__main__":
    sys.exit(main())
