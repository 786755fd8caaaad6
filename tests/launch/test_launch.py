"""What surrounds a submission and needs no Slurm: options and limits, members of an array, the table of a group."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, SUMMARY

from dist_train import config
from dist_train.errors import UserError
from dist_train.launch import cluster, node, submit
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


def test_torchrun_is_for_several_ranks() -> None:
    for nodes, per_node in ((1, 1), (1, 2), (2, 1)):
        words = node.start_ranks(["seed=1"], per_node, node.JobNode(0, nodes, 1, "start"), "first:29500")
        assert ("dist_train.launch.agent" in words) is (nodes * per_node > 1)
        assert words[-2:] == ["dist_train.main", "seed=1"]


def test_variables_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"STEP_ID": "0", "NODEID": "1", "STEP_NUM_NODES": "2", "JOB_ID": "7", "CPUS_ON_NODE": "1"}
    for name, value in right.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert node.current_node() == node.JobNode(1, 2, 1, "7.0")
    for name, wrong in (("NODEID", "2"), ("STEP_NUM_NODES", "0"), ("JOB_ID", ""), ("CPUS_ON_NODE", "two")):
        with monkeypatch.context() as patch:
            patch.setenv(f"SLURM_{name}", wrong)
            with pytest.raises(UserError, match=f"SLURM_{name} = '{wrong}': give a whole number .*; start with srun"):
                node.current_node()


def test_no_scontrol_where_a_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PATH": "/nowhere", "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert not node._requeue(tmp_path, 0, [signal.SIGUSR1])
    told = "job 7_2 could not be requeued (no scontrol in PATH); submit it again with --run-dir"
    assert capsys.readouterr().err == f"dist_train: {told} {tmp_path}\n"


def test_members() -> None:
    found = submit.members(["--preset", "digits"], "0-1,7", ["optim.default.lr=0.1,0.2"])
    assert list(found) == [f"lr{lr}-seed{seed}" for lr in (0.1, 0.2) for seed in (0, 1, 7)]
    assert found["lr0.2-seed7"] == ["--preset", "digits", "optim.default.lr=0.2", "train.seed=7"]


@pytest.mark.parametrize(
    ("seeds", "grid", "sentence"),
    [
        ("a", [], "--seeds a: write it as"),
        ("", ["lr"], "--grid lr: write it as"),
        ("1,1", [], "would be called seed1"),
    ],
)
def test_members_refused(seeds: str, grid: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        submit.members([], seeds, grid)


REFUSED_OPTIONS: list[tuple[list[str], str]] = [
    (["--at-most", "-1", "--seeds", "0-1"], "argument --at-most: -1 is not a whole number from 1 to 100000"),
    (["--at-most", "0"], "argument --at-most: 0 is not a whole number from 1 to 100000"),
    (["--nodes", "0"], "argument --nodes: 0 is not a whole number from 1 to 100000"),
    (["--cpus-per-node", "0"], "argument --cpus-per-node: 0 is not a whole number from 1 to 100000"),
    (["--gpus-per-node", "-1"], "argument --gpus-per-node: -1 is not a whole number from 0 to 100000"),
    (["--gpus-per-node", "64", "microbatches=64"], "GPUs; ask for fewer"),
    (["--sbatch", "nodes=\u00b2"], "one line of printable characters"),
    (["--sbatch", "nodes=0"], "--nodes 0: give a whole number from 1"),
    (["--sbatch", "cpus-per-task=many"], "--cpus-per-task many: give a whole number from 1"),
    (["--time", "abc"], "--time abc: not a time limit"),
    (["--time", "0"], "--time 0: give at least a minute"),
    (["--time", "9" * 30], "not a time limit"),
    (["--sbatch", "time=abc"], "--time abc: not a time limit"),
    (["--sbatch", "qos=low\ntouch oops"], "one line of printable characters"),
    (["--sbatch", "qos\ntouch oops\n#=low"], "not the long name of an option of sbatch"),
    (["--sbatch", "qos low"], "not the long name of an option of sbatch"),
    (["--sbatch", ""], "an empty argument"),
    (["--sbatch", "array=0-99"], "--sbatch array: submit sets this one itself; remove it"),
    (["--seeds", "5-2"], "--seeds 5-2: 5-2 ends before it begins"),
    (["--seeds", "0,7-3"], "7-3 ends before it begins"),
    (["--seeds", "0-99999999999"], "100000000000 members are too many; ask for at most 10000"),
    (["--seeds", "0-\u0663"], "write it as 0-4 or 0,2,5"),
    (["--seeds", "0-9999", "--grid", "epochs=1,2"], "20000 members are too many"),
    ([word for name in "abcdefghijkl" for word in ("--grid", f"{name}=0,1,2,3,4,5,6,7,8,9")], "1000000000000 members"),
    (["--grid", "seed=1,2", "--seeds", "3"], "seed1-seed3 and seed2-seed3 have the same settings"),
    (["--grid", "epochs=1,1.0"], "epochs1 and epochs1.0 have the same settings"),
    (["--run-dir", "here\ntouch oops"], "a job's folder has a name of printable characters"),
    (["--run-dir", "x" * 300], "is too long for a file's name"),
    (["--job-name", "x" * 300], "is too long for a file's name"),
    (["--grid", f"project={'x' * 300},y"], "is too long for a file's name"),
    (["--partition", ""], "an empty argument"),
    # what the training would refuse
    (["batch_size=250"], "train.batch_size = 250 does not split into train.microbatches = 8"),
    (["optim.norms.algorithm=muon"], "optim.norms.algorithm = muon: it is for kernels only"),
    (["data.dataset=cats"], "data.dataset = cats: there is no such data set"),
    (["wandb=offline", "project=a/b"], "record.project = a/b: a W&B project has"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED_OPTIONS)
def test_options_are_checked_before_anything_begins(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit.main(["--local", "--preset", "digits", *options]) == 2
    out, told = capsys.readouterr()
    assert (out, told.count("\n")) == ("", 1)
    assert sentence in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("translate=40", "data.translate = 40 shifts images of 32x32 pixels out of sight"),
        ("holdout=1400", "need more than the 1437 training images of digits"),
        ("model.blocks.0.convolutions=[{},{padding=0}]", "block 1, convolution 2 gives images of 14x14 pixels"),
        ("data.smaller=[{size=3,until=0.5}]", "leaves nothing of an image"),
        ("data.dataset=cifar10", "holds digits, but data.dataset = cifar10"),
    ],
)
@pytest.mark.parametrize("local", [["--local"], []])
def test_what_does_not_fit_the_betons_is_refused_before_anything_begins(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    local: list[str],
    settings: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit.main([*local, "--preset", "digits", f"data.dir={digits}", settings]) == 2
    out, told = capsys.readouterr()
    assert (out, told.count("\n")) == ("", 1)
    assert sentence in told
    assert not list(tmp_path.iterdir())


def test_a_run_of_other_settings_and_a_folder_below_a_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config.to_toml(config.load("digits", None, ["seed=1"])))
    assert submit.main(["--local", "--preset", "digits", "--run-dir", "run"]) == 2
    assert "--run-dir run belongs to a run with another train.seed" in capsys.readouterr().err
    assert submit.main(["--local", "--preset", "digits", "--run-dir", "run/config.toml/below"]) == 2
    assert "--run-dir run/config.toml/below: cannot be written" in capsys.readouterr().err


def test_an_array_without_members() -> None:
    with pytest.raises(UserError, match="nothing to submit"):
        submit.array({}, local=True)
    with pytest.raises(UserError, match="--at-most -1"):
        submit.array({"one": ["--preset", "digits"]}, at_most=-1, local=True)


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
    written, damaged = table.write(tmp_path)
    assert not damaged
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
