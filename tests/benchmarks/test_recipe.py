"""Recipes: variants are trained in turns, resume, and are compared on held-out images."""

from __future__ import annotations

import importlib
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, environment
from scipy.stats import t as student

from dist_train import config
from dist_train.runs.run import Run

RECIPE = """
preset = "digits"
width = 0.5
seeds = [3, 1]

[settings]
data.holdout = 400
train.epochs = 5
precision = "fp32"
evaluate = { tta = "mirror", every = 9 }
record.wandb = "disabled"

[[variants]]
name = "as it is"

[[variants]]
name = "3x3 alone"
width = 0.25
settings.optim.kernels.lr = 0.02
[variants.settings.model.blocks]
0.convolutions = [{ kernel = 3 }]
1 = { convolutions = [{ kernel = 3 }], coefficients = "sigmoid" }
"""
STEPS = 5 * ((1437 - 400) // 128)


def started(recipe: Path, digits: Path, ranks: int) -> subprocess.Popen[str]:
    out = ["--out", str(recipe.parent / "runs"), "--ranks", str(ranks)]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.recipe", str(recipe), *out, f"data.dir={digits}", "train.device=cpu"],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cells(text: str, first: str) -> dict[str, list[str]]:
    """The rows of the last table in a text whose header begins with the cell `first`, by their own first cells."""
    *_, rows = re.findall(rf"^\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    split = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {name: rest for name, *rest in split}


def spread(values: list[float], digits: int) -> str:
    """Mean, standard deviation and interval of two values."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    half = student.ppf(0.975, 1) * deviation / 2**0.5
    return (
        f"**{mean:.{digits}f}** ± {deviation:.{digits}f} (95 %: {mean - half:.{digits}f} to {mean + half:.{digits}f})"
    )


def test_variants_are_trained_in_turns_resume_and_are_compared(digits: Path, tmp_path: Path) -> None:
    recipe, runs = tmp_path / "mine.toml", tmp_path / "runs"
    recipe.write_text(RECIPE)
    process = started(recipe, digits, ranks=2)
    deadline, second = time.monotonic() + 200, runs / "3x3_alone-seed3" / "metrics.jsonl"
    while not second.exists() or second.read_text().count('"step"') < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=100)
    assert process.returncode == 75, said
    if tuple(map(int, version("torch").split(".")[:2])) > (2, 9):
        assert said.count("\n") == 1, said  # the launcher of torch 2.9 prints its own account of the signal
    assert said.splitlines()[-1] == "dist_train: stopped; the same command continues"
    names = ["as_it_is-seed3", "3x3_alone-seed3", "as_it_is-seed1", "3x3_alone-seed1"]
    assert {path.name for path in runs.iterdir() if path.is_dir()} == {*names[:2]}
    assert cells(printed, "variant")["3x3 alone"] == ["0 of 2", *["not yet"] * 5]
    assert cells(printed, "minus as it is") == {"3x3 alone": ["0", *["not yet"] * 6]}
    stopped_at = Run(runs / names[1]).history[-1]["step"]
    *_, missing = printed.splitlines()
    assert missing.replace("\\", "") == f"Not done: 3 of 4 runs; 3x3_alone-seed3 preempted at step {stopped_at}"
    finished = (runs / names[0] / "summary.json").stat().st_mtime_ns

    process = started(recipe, digits, ranks=1)
    printed, said = process.communicate(timeout=200)
    assert (process.returncode, said) == (0, "")
    assert re.findall(r"^\d of 4: .+, seed \d: \S+/(\S+)$", printed, re.MULTILINE) == names[1:]
    assert (runs / names[0] / "summary.json").stat().st_mtime_ns == finished
    assert [start["step"] for start in Run(runs / names[1]).starts] == [0, stopped_at]
    assert 0 < stopped_at < STEPS

    settings = Run(runs / names[1]).settings
    assert [block.channels for block in settings.model.blocks] == [8, 16]
    assert (settings.model.stem.channels, settings.model.blocks[1].coefficients) == (4, "sigmoid")
    assert (settings.optim.kernels.lr, settings.data.holdout, settings.evaluate.every) == (0.02, 400, 9)
    by_name = {name: json.loads((runs / name / "summary.json").read_text()) for name in names}
    one, two = ([by_name[f"{name}-seed{seed}"] for seed in (3, 1)] for name in ("as_it_is", "3x3_alone"))
    assert [(by_name[name]["steps"], by_name[name]["world_size"]) for name in names] == [(STEPS, 2), *3 * [(STEPS, 1)]]
    of_test = {f"{100 * value:.2f}" for summary in one for key, value in summary.items() if key == "test_accuracy"}

    text = (runs / "results.md").read_text()
    assert text.count("| variant |") == 2
    assert text.endswith(printed[printed.index("| variant |") :])
    assert not of_test & {*re.findall(r"\d+\.\d\d", text)} - {f"{100 * s['val_accuracy']:.2f}" for s in one}
    last = text[text.rindex("; torch ") :]
    assert f"python -m benchmarks.recipe {recipe} " in last
    assert ", 2 and 1 ranks; torch " in text
    for name, summaries in (("as it is", one), ("3x3 alone", two)):
        measures = [("val_loss", 1, 4), ("val_accuracy", 100, 2), ("val_accuracy_tta", 100, 2)]
        values = [spread([factor * s[key] for s in summaries], digits) for key, factor, digits in measures]
        operations = f"{two[0]['train_flops'] / one[0]['train_flops'] if summaries is two else 1:.3f}"
        seconds = f"{statistics.mean(s['train_seconds'] for s in summaries):,.1f}"
        assert cells(last, "variant")[name] == ["2", *values, operations, seconds]
    differences = [100 * (b["val_accuracy"] - a["val_accuracy"]) for a, b in zip(one, two, strict=True)]
    mean, half = statistics.mean(differences), student.ppf(0.975, 1) * statistics.stdev(differences) / 2**0.5
    found = cells(last, "minus as it is")["3x3 alone"]
    assert found[0] == "2"
    assert found[3:5] == [f"**{mean:+.2f}** (95 %: {mean - half:+.2f} to {mean + half:+.2f})", f"{half:.2f}"]


Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.syspath_prepend(REPOSITORY)
    module: Any = importlib.import_module("benchmarks.recipe")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
        code: int = module.main()
        return code

    return run


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (RECIPE, "seeds = [", "not valid TOML"),
        ("seeds = [3, 1]", "", "seeds: field required"),
        ("seeds = [3, 1]", "seed = [3, 1]", "seed: extra inputs are not permitted"),
        ("seeds = [3, 1]", "seeds = [3, 3]", "seeds = [3, 3]: a seed is given twice"),
        ("width = 0.5", "widht = 0.5", "widht: extra inputs are not permitted"),
        ("width = 0.5", "width = 0.3", "width = 0.3 makes 9.6 of model.blocks.0.channels = 32"),
        ('name = "3x3 alone"', 'name = "as_it is"', "two would have the folder as_it_is"),
        ("data.holdout = 400", "", "data.holdout = 0: variants are compared on images that are held out"),
        ("train.epochs = 5", "train.epohcs = 5", "train.epohcs: there is no such setting; did you mean epochs?"),
        ("train.epochs = 5", "seed = 5", "train.seed: the seeds are those of the recipe"),
        ("settings.optim.kernels.lr = 0.02", "settings.data.holdout = 300", "its held-out images are not those"),
        ("[{ kernel = 3 }]\n1", "[{ kernel = 3, groups = 16 }]\n1", "groups = 16 does not divide its 4 input channels"),
        ("width = 0.25", "width = 0", "variants.1.width: input should be greater than 0"),
        ('"sigmoid"', '"raw", temperature = 3.0', "model.blocks.1.temperature = 3.0 has no effect"),
    ],
)
def test_a_bad_recipe_is_answered_in_one_sentence(
    main: Main, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    recipe = tmp_path / "mine.toml"
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    assert main(recipe, "--out", tmp_path / "runs", f"data.dir={digits}") == 2
    printed, said = capsys.readouterr()
    assert said.startswith(f"dist_train: {recipe}: ")
    assert words in said
    assert (printed, said.count("\n")) == ("", 1)
    assert not (tmp_path / "runs").exists()


def test_a_missing_recipe_and_runs_of_other_settings_are_refused(
    main: Main, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tmp_path / "absent.toml") == 2
    assert "absent.toml: cannot be read (No such file or directory)" in capsys.readouterr().err
    recipe, run = tmp_path / "mine.toml", tmp_path / "runs" / "as_it_is-seed1"
    recipe.write_text(RECIPE)
    run.mkdir(parents=True)
    (run / "config.toml").write_text(config.to_toml(config.load("digits", None, ["seed=1", "data.holdout=400"])))
    assert main(recipe, "--out", tmp_path / "runs", f"data.dir={digits}") == 2
    said = capsys.readouterr().err
    assert f"--run-dir {run} belongs to a run with another " in said
    assert "model.blocks.0.channels" in said


def test_the_recipes_here_are_whole(main: Main, digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Up to the first training."""
    module: Any = sys.modules["benchmarks.recipe"]
    monkeypatch.setattr(module, "train", lambda *_: (0, 0))
    settings = ["data.dataset=digits", f"data.dir={digits}", "data.holdout=300", "batch_size=160"]
    paths = [*REPOSITORY.glob("benchmarks/recipes/*.toml")]
    assert paths
    for path in paths:
        assert main(path, "--out", tmp_path, *settings) == 0
