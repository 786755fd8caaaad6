"""What surrounds a submission and needs no Slurm: options and limits, members of an array, the table of a group."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SUMMARY

from dist_train import config
from dist_train.errors import UserError
from dist_train.launch import cluster, submit
from dist_train.reports import statistics, table
from dist_train.runs import layout
from dist_train.runs.history import append_history


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("2-0", 2880), ("1-2:30", 1590), ("1-2:30:59", 1591)],
)
def test_minutes(text: str, expected: int) -> None:
    assert cluster.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "1-", "-5"])
def test_not_minutes(text: str) -> None:
    with pytest.raises(UserError, match="not a time limit"):
        cluster.minutes(text)


def test_options_and_set_up_of_a_script(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    lines = [
        "#SBATCH --partition=gpu",
        "##SBATCH --account=mine",
        "#SBATCH -t 1:00:00  # an hour",
        "#SBATCH --exclusive",
    ]
    script.write_text("\n".join([*lines, "# set-up: of the nodes", "module load cuda", "# end of set-up", "exec srun"]))
    assert cluster.options(script) == {"partition": "gpu", "time": "1:00:00", "exclusive": True}
    assert cluster.set_up(script) == ["module load cuda"]
    script.write_text("#SBATCH -Z what\n")
    with pytest.raises(UserError, match="#SBATCH -Z what: cannot be read"):
        cluster.options(script)
    with pytest.raises(UserError, match="between a line # set-up"):
        cluster.set_up(script)


def test_the_script_that_comes_with_the_project() -> None:
    options = cluster.options()
    assert options["requeue"] is True
    assert str(options["signal"]).startswith("USR1@")
    assert any("activate" in line for line in cluster.set_up())
    subprocess.run(["bash", "-n", str(cluster.SCRIPT)], check=True)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"there is no Slurm on this machine .* --local"):
        submit.train(["--preset", "digits"])


def test_members() -> None:
    found = submit.members(["--preset", "digits"], "0-1,7", ["optim.default.lr=0.1,0.2"])
    assert list(found) == [f"lr{lr}-seed{seed}" for lr in (0.1, 0.2) for seed in (0, 1, 7)]
    assert found["lr0.2-seed7"] == ["--preset", "digits", "optim.default.lr=0.2", "train.seed=7"]


@pytest.mark.parametrize(
    ("seeds", "grid", "sentence"),
    [("a", [], "--seeds a: write it as"), ("", ["lr"], "--grid lr: write it as"), ("1,1", [], "would be called seed1")],
)
def test_members_refused(seeds: str, grid: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        submit.members([], seeds, grid)


def test_interval() -> None:
    assert statistics.interval([1.0, 2.0, 3.0]) == pytest.approx(
        4.302653 / math.sqrt(3)
    )  # t for two degrees of freedom
    assert statistics.interval([1.0]) == math.inf


def test_table_survives_missing_members(tmp_path: Path) -> None:
    group = tmp_path / "group"
    for lr in (0.001, 0.002):
        for seed in (2, 10):
            folder = group / f"lr{lr}-seed{seed}"
            folder.mkdir(parents=True)
            settings = config.load("digits", None, [f"optim.default.lr={lr}", f"seed={seed}"])
            (folder / "config.toml").write_text(config.to_toml(settings))
            if (lr, seed) == (0.002, 10):
                append_history(folder, "start", step=0)
                append_history(folder, "end", outcome="preempted", step=7, reason="")
            else:
                summary = {**SUMMARY, "test_accuracy": 0.9 + seed / 1000, "train_seconds": 10.0}
                (folder / "summary.json").write_text(json.dumps(summary))
    expected: dict[str, list[str]] = {path.name: [] for path in group.iterdir()}
    expected["lr0.002-seed11"] = []
    (group / layout.MEMBERS).write_text(json.dumps(expected))
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", "table", str(group)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (group / "table.md").read_text()
    header, _, low, high, _, missing = done.stdout.splitlines()
    assert header == "| optim.default.lr | n | test accuracy, % | training, s |"
    half = statistics.interval([90.2, 91.0])
    assert low == f"| 0.001 | 2 | **90.60** ± 0.57 (95 %: {90.6 - half:.2f} to {90.6 + half:.2f}) | 10.0 |"
    assert high == "| 0.002 | 1 of 2 | 90.20 | 10.0 |"
    assert missing == "missing: lr0.002-seed10: preempted at step 7, lr0.002-seed11: not begun"


def test_a_group_has_no_exports(tmp_path: Path) -> None:
    """Those of its runs, and those beside them, are not members; a run is not a group."""
    folders = [tmp_path / name for name in ("seed1", "seed1/export", "exported")]
    for folder, network in zip(folders, ("", *layout.EXPORTED.values()), strict=False):
        folder.mkdir()
        (folder / "config.toml").write_text(config.to_toml(config.load("digits", None, [])))
        if network:
            (folder / network).touch()
    (folders[0] / "summary.json").write_text(json.dumps(SUMMARY))
    written = table.write(tmp_path)
    assert "missing" not in written
    assert written.splitlines()[2].startswith("| 1 | 90.00 |")
    with pytest.raises(UserError, match="seed1: is the folder of one run; name the folder above it"):
        table.write(folders[0])
    assert not (folders[0] / layout.TABLE).exists()
    with pytest.raises(UserError, match="exported: holds no runs"):
        table.write(folders[2])


def test_table_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        table.write(tmp_path)
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        table.write(tmp_path / "nowhere")
