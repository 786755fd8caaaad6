"""The benchmarks' commands, with few steps, on the handwritten digits."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, environment, trainer

from benchmarks.speed import first_measured


def cells(*command: object) -> list[list[str]]:
    """The table that a benchmark appends to its --out file."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    text = Path(str(command[command.index("--out") + 1])).read_text()
    assert f"python -m {command[0]} " in text
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_speed_adds_up_the_kinds_of_steps_of_the_schedule(digits: Path, tmp_path: Path) -> None:
    sizes = "data.smaller=[{size=16, until=0.5}]"
    header, *rows = cells(
        *("benchmarks.speed", "--preset", "digits", "--one-rank", "--steps", 2, "--warm-up", 1),
        *("--out", tmp_path / "table.md", f"data.dir={digits}", "train.device=cpu", "epochs=2", sizes),
    )
    name, kind, n, in_a_run, training = (
        header.index(title) for title in ("what", "kind of step", "n", "in a run", "training, s")
    )
    for program in ("ours", rows[-1][name]):
        mine = [row for row in rows if row[name] == program]
        assert [row[kind] for row in mine] == ["16x16, stem learns", "32x32, stem learns", "training"]
        assert [row[in_a_run] for row in mine[:2]] == ["11", "11"]  # 1437 // 128 steps in an epoch
        assert {row[n] for row in mine[:2]} == {"2"}
        parts, whole = [float(row[training]) for row in mine[:2]], float(mine[2][training].split()[0].strip("*"))
        assert abs(sum(parts) - whole) < 0.02
    assert float(rows[-1][-1].split()[0].strip("*")) > 0


@pytest.mark.parametrize(
    ("steps", "count", "first"),
    [(range(672, 925), 3, 675), (range(52, 120), 24, 75), (range(52, 120), 25, 52), (range(8, 12), 3, 8)],
)
def test_speed_measures_no_epochs_end_where_a_kind_has_enough_steps(steps: range, count: int, first: int) -> None:
    assert first_measured(steps, count, per_epoch=25) == first


def test_speed_with_short_writes_the_betons_and_prints_one_line(tmp_path: Path) -> None:
    settings = ["--preset", "digits", "--short", "--steps", "1", f"data.dir={tmp_path / 'betons'}", "train.device=cpu"]
    done = trainer(*settings, module="benchmarks.speed")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        r"torch \S+: digits trains in (\d+) s, at (\d+\.\d+) of the matrix rate of ([\d,]+) GFLOP/s\n", done.stdout
    )
    assert found, done.stdout
    assert all(float(number.replace(",", "")) > 0 for number in found.groups())


def test_startup_splits_the_time_to_the_first_step(digits: Path, tmp_path: Path) -> None:
    _, *rows = cells(
        *("benchmarks.startup", "--ranks", 1, "--rounds", 1, "--out", tmp_path / "table.md"),
        *("--preset", "digits", f"data.dir={digits}", "train.device=cpu", "record.wandb=disabled"),
    )
    seconds = {row[0]: float(row[1].split()[0]) for row in rows}
    total = seconds.pop("sum")
    assert abs(sum(seconds.values()) - total) < 0.1
    for part in ("imports", "data", "warm-up", "first step"):
        assert seconds[part] > 0.01
    assert seconds["rest"] > -0.05


@pytest.mark.parametrize(("fraction", "microbatch", "step"), [(1, 230, 2300), (0.5, 232, 2310)])
def test_a_step_dispatches_no_more_operations_than_it_did(
    tmp_path: Path, fraction: float, microbatch: int, step: int
) -> None:
    """Of block94 on all images, and on those that it selects."""
    _, *rows = cells("benchmarks.operations", "--out", tmp_path / "table.md", f"train.select.fraction={fraction}")
    operations = {row[0]: int(row[1]) for row in rows}
    assert 0 < operations["forward and backward pass of a microbatch"] <= microbatch
    assert 0 < operations["update of the weights"] <= 90
    assert 0 < operations["whole step"] <= step
    if tuple(map(int, version("torch").split(".")[:2])) > (2, 9):
        assert 0 < operations["forward pass of a microbatch on a GPU"] <= 75


def test_the_parts_of_a_step_add_up_to_its_time(tmp_path: Path) -> None:
    command = ["benchmarks.operations", "--preset", "digits", "--images", 16, "--seconds", 1]
    _, *rows = cells(*command, "--out", tmp_path / "table.md", "train.precision=fp32")
    milliseconds = {row[0]: float(row[1].split()[0].replace(",", "")) for row in rows}
    whole = milliseconds.pop("whole step")
    assert abs(sum(milliseconds.values()) - whole) < 0.1 * len(milliseconds)
    for part in ("convolutions", "1x1 kernels and fully connected layers", "BatchNorm", "update of the weights"):
        assert milliseconds[part] > 0
    assert all(row[2].endswith(" %") for row in rows)


def test_gpu_reports_a_command_that_ran_out_of_time(tmp_path: Path) -> None:
    command = ["benchmarks.gpu", "--out", str(tmp_path / "gpu"), "--limit", "1"]
    subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, env=environment(), check=True, timeout=100)
    *_, line = (tmp_path / "gpu" / "report.md").read_text().splitlines()
    assert line.startswith("| block94 | out of time | ")
    assert (tmp_path / "gpu" / "block94.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("checkpoint --rounds 0", "argument --rounds: 0 is not a whole number from 1 to 100000"),
        ("gpu --out {tmp}/gpu --limit nan", "argument --limit: nan is not a number above 0"),
        ("gpu --out {tmp}/gpu --hiverge {tmp}/absent", "absent is not a folder; give the folder of the clone"),
        ("loading --rounds -1", "argument --rounds"),
        ("loading --data {tmp}/absent", "absent/manifest.json is missing, so there is no data set there"),
        ("loading --data {digits} --cifar10 {tmp}", "it has no folder cifar-10-batches-py"),
        ("loading --data {digits}", "it has fewer training images than a batch, 2000; name another"),
        ("mixing --rounds x", "argument --rounds: x is not a whole number"),
        ("mixing --out {tmp}", "is a folder; name a file"),
        ("operations --images 0", "argument --images: 0 is not"),
        ("operations --size 3", "block 3: pool = 2 leaves nothing of an image of 1x1 pixels"),
        ("operations --preset blok94", "--preset blok94: there is no such preset; did you mean block94?"),
        ("operations --out {tmp}/absent/table.md", "absent is not a folder; make it, or name a file elsewhere"),
        ("operations epochs=few", 'train.epochs = "few": input should be a valid number'),
        ("peer", "the following arguments are required"),
        ("recipe", "the following arguments are required: FILE"),
        ("recipe mine.toml --results {tmp}/absent/table.md", "absent is not a folder; make it"),
        ("reduction --ranks 2 0", "argument --ranks: 0 is not"),
        ("reduction --elements 0", "argument --elements: 0 is not a whole number from 1 to 999999999"),
        ("reduction --preset blok94", "--preset blok94: there is no such preset"),
        ("setup --rounds 0", "argument --rounds: 0 is not"),
        ("speed --steps 0", "argument --steps: 0 is not"),
        ("speed --turn 1.5", "argument --turn: 1.5 is not"),
        ("speed --airbench {tmp}/absent", "airbench94_muon.py: there is no such file; give the folder of the clone"),
        ("startup --ranks 0", "argument --ranks: 0 is not"),
        ("startup epohcs=3", "epohcs: there is no such setting; did you mean train.epochs?"),
    ],
)
def test_bad_arguments_are_answered_in_one_sentence(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    words: str,
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)
    name, *rest = arguments.format(tmp=tmp_path, digits=digits).split()
    module: Any = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *rest])
    assert module.main() == 2
    printed, said = capsys.readouterr()
    assert said.startswith("dist_train: ")
    assert words in said
    assert (printed, said.count("\n")) == ("", 1)
    assert not any(tmp_path.iterdir())
