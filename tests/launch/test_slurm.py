"""Slurm for real: trainings on a cluster of virtual nodes, through sbatch and submitit, and all that may befall them.

Every node has one CPU, and so every job one rank for each of its nodes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, environment, trainer
from slurm_cluster import Cluster, missing
from wandb_server import distinct, expected_rows, offline_records, own

from dist_train.commands.diff import main as diff
from dist_train.errors import UserError
from dist_train.launch import cluster as slurm
from dist_train.launch import submit
from dist_train.reports import statistics
from dist_train.runs import run
from dist_train.runs.history import read_history

SCRIPT = REPOSITORY / "slurm" / "train.sh"
if why := missing():
    pytest.skip(why, allow_module_level=True)


@dataclass(frozen=True)
class Lab:
    """The cluster and a folder to submit from. long: arguments of a training of 165 steps, with a checkpoint every 20;
    undisturbed: its run on one rank, without Slurm."""

    cluster: Cluster
    folder: Path
    common: list[str]
    long: list[str]
    undisturbed: Path

    def sbatch(self, options: list[str], arguments: list[str], **variables: str) -> str:
        """Submit slurm/train.sh. Returns the job's number."""
        command = ["sbatch", "--parsable", *options, SCRIPT, *arguments]
        return self.cluster.run(*command, cwd=self.folder, **variables)

    def run_dir(self, job: str) -> Path:
        return self.folder / "runs" / f"train-{job}"

    def log(self, job: str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text()

    def trains(self, run_dir: Path, steps: int = 5) -> None:
        """Wait until a run has come so far."""
        path = run_dir / "metrics.jsonl"
        self.cluster.wait(lambda: path.exists() and path.read_bytes().count(b'"step"') > steps, f"{run_dir} to train")

    def same_bits(self, run_dir: Path) -> None:
        assert diff([str(run_dir), str(self.undisturbed)]) == 0


@pytest.fixture(scope="module")
def lab(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / ".venv").symlink_to(Path(sys.prefix))
    common = ["--preset", "digits", f"data.dir={digits}", "record.wandb=disabled", "record.quiet=true"]
    common += ["train.device=cpu", "batch_size=128", "precision=fp32"]
    common += [f"model.{part}.channels=8" for part in ("stem", "blocks.0", "blocks.1")]
    long = [*common, "train.epochs=15", "every_steps=20"]
    undisturbed = folder / "undisturbed"
    assert trainer(*long, "--run-dir", undisturbed).returncode == 0
    with Cluster() as cluster, pytest.MonkeyPatch.context() as patch:
        for name in environment().keys() ^ os.environ.keys():
            patch.delenv(name, raising=False)
        for name, value in (cluster.environment | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", slowed(folder / "slow", 0.07))
        patch.chdir(folder)
        yield Lab(cluster, folder, common, long, undisturbed)


def outcomes(run_dir: Path) -> list[str]:
    """How the starts of a run ended."""
    return [row["outcome"] for row in read_history(run_dir) if row["event"] == "end"]


def starts(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_history(run_dir) if row["event"] == "start"]


def left_behind(run_dir: Path) -> list[str]:
    """Processes that name a run folder."""
    shown = subprocess.run(["ps", "-eo", "pid,args", "-ww"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if str(run_dir) in line and "dist_train" in line]


# Both are read by every Python that is started with their folder in PYTHONPATH. The first makes the steps of a rank
# wait: a training of a small network then lasts about as long on every machine, and uses little processor time.
SLOW = """
import sys
if "dist_train.main" in sys.orig_argv[:5] and "torch.distributed.run" not in sys.orig_argv:
    import time
    from dist_train.training.optimizers import Optimizers
    step = Optimizers.step
    def slow(self, scaler):
        time.sleep({seconds})
        return step(self, scaler)
    Optimizers.step = slow
"""
FAILING = """
import os
if os.environ.get("RANK") == "1":
    from dist_train.training.optimizers import Optimizers
    step, steps = Optimizers.step, []
    def fail(self, scaler):
        steps.append(0)
        if len(steps) == 4:
            raise ValueError("out of luck on purpose")
        return step(self, scaler)
    Optimizers.step = fail
"""


def slowed(folder: Path, seconds: float) -> str:
    """PYTHONPATH with a new folder, whose `sitecustomize.py` makes each step of a rank so much longer."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW.format(seconds=seconds))
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def limited(lab: Lab) -> str:
    """A job that meets its time limit, while the other tests run: Slurm's limits are whole minutes."""
    return lab.sbatch(["--time=2", "--signal=USR1@75"], lab.long, PYTHONPATH=slowed(lab.folder / "slower", 0.35))


def test_sbatch_on_two_nodes(lab: Lab, limited: str) -> None:
    job = lab.sbatch(["--nodes=2"], lab.long)
    assert lab.cluster.ended(job) == "COMPLETED", lab.log(job)
    assert [row["world_size"] for row in starts(lab.run_dir(job))] == [2]
    lab.same_bits(lab.run_dir(job))


def test_requeue_resumes_the_same_wandb_run(lab: Lab, limited: str) -> None:
    job = lab.sbatch(["--nodes=2"], [*lab.long, "record.wandb=offline"])
    lab.trains(lab.run_dir(job))
    lab.cluster.run("scontrol", "requeue", job)
    assert lab.cluster.ended(job) == "COMPLETED", lab.log(job)
    assert outcomes(lab.run_dir(job)) == ["preempted", "done"]
    lab.same_bits(lab.run_dir(job))
    count = len([*(lab.run_dir(job) / "wandb").glob("offline-run-*/*.wandb")])  # three, if wandb's helper was ended
    parts = [offline_records(lab.run_dir(job), number) for number in range(count)]
    assert len({record["run"]["run_id"] for part in parts for record in part if record["type"] == "run"}) == 1
    rows = [own(record["history"]["item"]) for part in parts for record in part if record["type"] == "history"]
    seen = [{key: value for key, value in row.items() if key != "train/mfu"} for row in rows if "step" in row]
    assert distinct(seen) == expected_rows(lab.run_dir(job))


def test_preempted_by_a_job_of_higher_priority(lab: Lab, limited: str) -> None:
    job = lab.sbatch(["--nodes=2"], lab.long)
    lab.trains(lab.run_dir(job))
    urgent = lab.cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--wrap=sleep 1")
    assert lab.cluster.ended(urgent) == "COMPLETED"
    assert lab.cluster.ended(job) == "COMPLETED", lab.log(job)
    assert outcomes(lab.run_dir(job)) == ["preempted", "done"]
    lab.same_bits(lab.run_dir(job))


def test_cancel_ends_it_for_good(lab: Lab, limited: str) -> None:
    job = lab.sbatch([], lab.long)
    lab.trains(lab.run_dir(job))
    lab.cluster.run("scancel", job)
    assert lab.cluster.ended(job) == "CANCELLED"
    lab.cluster.wait(lambda: not left_behind(lab.run_dir(job)), "its processes to end", 20)
    assert lab.cluster.job(job)["Restarts"] == "0"
    # what was saved can be resumed, on one rank without Slurm
    assert outcomes(lab.run_dir(job)) == ["preempted"]
    done = trainer(*lab.long, "--run-dir", lab.run_dir(job))
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    lab.same_bits(lab.run_dir(job))


def test_a_failing_rank_fails_the_job(lab: Lab, limited: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    job = lab.sbatch(["--nodes=2"], lab.long, PYTHONPATH=str(tmp_path))
    assert lab.cluster.ended(job) == "FAILED"
    assert lab.cluster.job(job)["Restarts"] == "0"
    end = lab.log(job).splitlines()[-12:]
    assert any(line.endswith("ValueError: out of luck on purpose") for line in end), lab.log(job)
    assert "SignalException" not in lab.log(job)
    assert not left_behind(lab.run_dir(job))
    assert len(starts(lab.run_dir(job))) == 1


def test_a_node_dies(lab: Lab, limited: str) -> None:
    job = submit.train(lab.long, nodes=2)  # of which submitit itself would say that it is over
    lab.trains(job.run_dir, 60)
    node = lab.cluster.nodes(job.id)[1]
    lab.cluster.power_off(node)
    try:
        result = job.result()
        assert node not in lab.cluster.nodes(job.id)
    finally:
        lab.cluster.power_on(node)
        lab.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    assert job.state() == "COMPLETED"
    assert len(starts(job.run_dir)) == 2
    assert starts(job.run_dir)[1]["step"] > 0
    assert result.run_dir == job.run_dir
    lab.same_bits(job.run_dir)


# submitit


def test_submitit_on_two_nodes_is_preempted_and_resumes(lab: Lab, limited: str) -> None:
    job = submit.train([*lab.long, "--run-dir", str(lab.folder / "of submitit; $(touch oops)")], nodes=2)
    lab.trains(job.run_dir)
    assert job.state() == "RUNNING"
    lab.cluster.run("scancel", "--signal=USR2", job.id)
    result = job.result()
    assert job.state() == "COMPLETED"
    assert outcomes(job.run_dir) == ["preempted", "done"]
    assert result.weights_sha256 == json.loads((lab.undisturbed / "summary.json").read_text())["weights_sha256"]
    assert 0.5 < result.test_accuracy <= 1
    assert not (lab.folder / "oops").exists()
    lab.same_bits(job.run_dir)


def test_submitit_reports_why_it_failed(
    lab: Lab, limited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = submit.train(lab.long, nodes=2)
    with pytest.raises(submit.JobError, match=r"(?s)ended as FAILED.*ValueError: out of luck on purpose"):
        job.result()
    assert not left_behind(job.run_dir)


def test_an_array_of_seeds_and_its_table(lab: Lab, limited: str) -> None:
    arguments = ["--seeds", "0-2", "--at-most", "2", "--job-name", "seeds", *lab.common, "train.epochs=4"]
    command = [sys.executable, "-m", "dist_train", "submit", "--wait", *arguments]
    waiting = subprocess.Popen(command, env={**os.environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lab.cluster.wait(lambda: "seeds" in lab.cluster.run("squeue", "--format=%j"), "the array")
    array = lab.cluster.run("squeue", "--noheader", "--name=seeds", "--format=%F").split()[0]
    assert lab.cluster.job(f"{array}_2")["ArrayTaskThrottle"] == "2"
    lab.cluster.run("scancel", f"{array}_2")  # it waits for a place, and will never run
    out, error = waiting.communicate(timeout=180)
    assert waiting.returncode == 1, error
    assert f"job {array}_2 " in error
    group = lab.folder / "runs" / f"seeds-{array}"
    text = (group / "table.md").read_text()
    assert out.endswith(text)
    assert "missing: seed2: not begun" in text
    accuracies = [100 * submit.Result.read(group / f"seed{seed}").test_accuracy for seed in (0, 1)]
    half = statistics.interval(accuracies)
    mean = sum(accuracies) / 2
    assert f"**{mean:.2f}**" in text
    assert f"{mean - half:.2f} to {mean + half:.2f}" in text


def test_sbatch_array_is_over_seeds(lab: Lab, limited: str) -> None:
    arguments = [*lab.common, "train.epochs=4", "record.wandb=offline"]
    job = lab.sbatch(["--array=3-5%1", "--job-name=both"], arguments)
    group = lab.folder / "runs" / f"both-{job}"
    assert lab.cluster.ended(f"{job}_3") == "COMPLETED"
    lab.trains(group / "seed4", 1)
    lab.cluster.run("scancel", f"{job}_4")
    # the last member has the number of the whole array, and yet goes back into the queue alone
    lab.trains(group / "seed5", 1)
    assert lab.cluster.job(f"{job}_5")["JobId"] == job
    lab.cluster.run("scancel", "--signal=USR1", f"{job}_5")
    assert lab.cluster.ended(f"{job}_5") == "COMPLETED"
    assert outcomes(group / "seed5") == ["preempted", "done"]
    assert [lab.cluster.state(f"{job}_{task}") for task in (3, 4)] == ["COMPLETED", "CANCELLED"]
    assert [lab.cluster.job(f"{job}_{task}")["Restarts"] for task in (3, 4, 5)] == ["0", "0", "1"]
    assert sorted(path.name for path in group.glob("*/summary.json")) == ["summary.json"] * 2
    assert [member.name for member in run.members(group)] == ["seed3", "seed4", "seed5"]
    assert "| 2 of 3 |" in (group / "table.md").read_text()
    runs = [record["run"] for record in offline_records(group / "seed3") if record["type"] == "run"]
    assert {run["run_group"] for run in runs} == {group.name}


def test_the_time_limit(lab: Lab, limited: str) -> None:
    assert lab.cluster.ended(limited, 240) == "COMPLETED", lab.log(limited)
    ends = outcomes(lab.run_dir(limited))
    assert len(ends) > 1
    assert set(ends[:-1]) == {"preempted"}
    assert ends[-1] == "done"
    assert int(lab.cluster.job(limited)["Restarts"]) >= len(ends) - 1
    reasons = [row["reason"] for row in read_history(lab.run_dir(limited)) if row["event"] == "end"]
    assert reasons[0].startswith("SIGUSR1")
    lab.same_bits(lab.run_dir(limited))


def test_a_job_is_not_ended_while_slurm_does_not_answer(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slurm.state("999999") == ""
    text = (lab.cluster.at / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", text))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert slurm.state("999999") == "UNKNOWN"


# before anything is submitted


REFUSED: list[tuple[dict[str, Any], list[str], str]] = [
    ({"partition": "nope"}, [], "--partition nope: there is no such partition; choose one of far, gpu, main, urgent"),
    ({"partition": "gpu", "gpus_per_node": 3}, [], "--gpus-per-node 3: a node of partition gpu has 2 GPUs"),
    ({"nodes": 9}, [], "--nodes 9: train.microbatches = 8 gives work to no more than"),
    ({"nodes": 3, "gpus_per_node": 4}, [], "--nodes 3 with --gpus-per-node 4: train.microbatches = 8"),
    ({"nodes": 5}, [], "--nodes 5: the default partition has 4 nodes"),
    ({"time": "2-0"}, [], "--time 2880 minutes: the default partition allows 60"),
    ({"time": "soon"}, [], "--time soon: not a time limit"),
    ({"partition": "far"}, [], "is on a disk of this machine"),
    ({"account": "a\n#SBATCH --uid=0"}, [], "one line of printable characters"),
    ({}, ["epohcs=3"], "did you mean train.epochs"),
]


@pytest.mark.parametrize(("options", "arguments", "sentence"), REFUSED)
def test_refused_before_it_is_submitted(lab: Lab, options: dict[str, Any], arguments: list[str], sentence: str) -> None:
    before = lab.cluster.run("scontrol", "show", "job")
    with pytest.raises(UserError) as refused:
        submit.train([*lab.common, *arguments], **options)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert lab.cluster.run("scontrol", "show", "job").count("JobId=") == before.count("JobId=")


def test_gpus_of_a_whole_node(lab: Lab) -> None:
    # declared ones, which torch does not see; to get as far as saying so, the trainer must have been given them
    arguments = [argument for argument in lab.common if argument != "train.device=cpu"]
    job = lab.sbatch(["--partition=gpu"], arguments)
    assert lab.cluster.ended(job) == "FAILED"
    assert lab.cluster.job(job)["ExitCode"] == "2:0"
    assert "Slurm gave 2 GPUs of g1 to this job, but torch finds none there" in lab.log(job)
    assert "Traceback" not in lab.log(job)


def test_an_array_on_this_machine(lab: Lab) -> None:
    arguments = ["--local", "--seeds", "0,1", *lab.common, "train.epochs=1", "--run-dir", str(lab.folder / "here")]
    command = [sys.executable, "-m", "dist_train", "submit", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith((lab.folder / "here" / "table.md").read_text())
    assert "| 2 | **" in done.stdout


def test_dry_run_submits_nothing(lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["submit", "--dry-run", "--nodes", "2", "--seeds", "0,5", "--sbatch", "qos=low", *lab.common]
    monkeypatch.setattr(sys, "argv", command)
    before = lab.cluster.run("scontrol", "show", "job").count("JobId=")
    assert submit.main() == 0
    shown = capsys.readouterr().out
    for line in ("#SBATCH --nodes=2", "#SBATCH --array=0-1%2", "#SBATCH --qos=low", "#SBATCH --requeue"):
        assert line in shown
    assert "train.seed=5 --run-dir runs/train-%A/seed5" in shown
    assert lab.cluster.run("scontrol", "show", "job").count("JobId=") == before


def test_a_node_without_the_run_folder(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_train.launch import node

    monkeypatch.setattr(node, "_MEET", 1.0)
    training = node.Training(lab.common, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="does not see the file that the job's first node wrote there"):
        training._meet(node.JobNode(1, 2, 1, "7.0"))
    found = node.Training(lab.common, tmp_path / "shared")
    meeting = found._meet(node.JobNode(0, 2, 1, "7.0"))
    assert found._meet(node.JobNode(1, 2, 1, "7.0")) == meeting


def test_stopped_before_its_ranks_have_begun(lab: Lab, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_train.launch.node", *lab.long, "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment(), cwd=lab.folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # from here on it listens
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not left_behind(tmp_path / "run")
