"""What a training sends to W&B, with the real SDK and a server made here."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
import torch
from conftest import REPOSITORY, command, environment
from PIL import Image
from recorded import EPOCH, MATRIX_RATE, opened, train, whole_run
from wandb_server import DIGITS, Run, Server, distinct, expected_rows, offline_records, offline_rows, own

from dist_train import errors
from dist_train.config.settings import RecordConfig
from dist_train.files import claimed
from dist_train.runs.layout import lock_path
from dist_train.runs.metrics import Row, read_metrics
from dist_train.tracking import client, messages
from dist_train.training import system_metrics

AUTO = RecordConfig(quiet=True, group="a group", tags=["first", "second"])
BRANCHES = [["conv1_3x3", "conv2_3x3_d2_s2"], ["conv1_5x5"]]  # of the runs that `opened` begins
KEY = "5ec2e7" + 34 * "7"  # W&B takes 40 characters for a key


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take away this machine's W&B account and settings."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.chdir(home)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def expected(run_dir: Path) -> list[Row]:
    return expected_rows(run_dir, BRANCHES, MATRIX_RATE)


def synced(run_dir: Path) -> None:
    """Upload what there is with W&B's own command."""
    folders = sorted(map(str, (run_dir / "wandb").glob("*run-*-*")))
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", "--include-online", *folders], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len([*(run_dir / "wandb").glob("*run-*-*/*.synced")]) == len(folders), done.stderr


# a training


@dataclass
class Trained:
    """A training of two epochs on two ranks. output: stdout and stderr. outside: all else that it could write to."""

    run_dir: Path
    outside: Path
    server: Server
    run: Run
    output: str
    summary: Row
    details: Row

    def command(self, *arguments: object, module: str) -> subprocess.CompletedProcess[str]:
        """Run one of the package's commands, with an account at the server."""
        env = {**environment(), "WANDB_BASE_URL": self.server.url, "WANDB_API_KEY": KEY}
        env |= {"HOME": str(self.outside), "NETRC": str(self.outside / "netrc"), "TMPDIR": str(self.outside)}
        ranks = 2 if module == "dist_train.main" else 1
        start = command(*arguments, module=module, ranks=ranks)
        return forked.run(start, REPOSITORY, env)

    def row(self) -> Row:
        """The row with what there is at the end."""
        (row,) = [row for row in self.run.history() if "plots/loss" in row]
        return row

    def table(self, name: str) -> Row:
        """A table that is in that row."""
        found: Row = json.loads(self.run.uploads[self.row()[f"evaluation/{name}"]["path"]])
        return found


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "outside").mkdir()
    with Server() as server:
        made = Trained(folder / "a run", folder / "outside", server, Run(""), "", {}, {})
        done = made.command(
            *("--preset", "digits", f"data.dir={digits}", "train.epochs=2", "batch_size=256", "train.device=cpu"),
            *("precision=fp32", "record.artifacts=all", "record.system=all", "--run-dir", made.run_dir),
            module="dist_train.main",
        )
        assert done.returncode == 0, done.stderr
        made.run, made.output = server.only(), done.stdout + done.stderr
        made.summary = json.loads((made.run_dir / "summary.json").read_text())
        made.details = json.loads((made.run_dir / "evaluation.json").read_text())
        yield made


def pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB").tobytes()


def test_curves_of_a_training(trained: Trained) -> None:
    rows = [row for row in trained.run.history() if "step" in row]
    assert rows == expected_rows(trained.run_dir, DIGITS, trained.summary["matrix_flops_per_second"])
    assert 0 < rows[0]["train/mfu"] < 2
    axes = {"train/*": "step", "eval/*": "epoch", "mixing/*": "epoch", "ranks/*": "elapsed_seconds"}
    assert trained.run.metrics() == axes
    summary = trained.run.summary()
    assert {key: summary[key] for key in trained.summary} == trained.summary
    assert summary["test_ece"] == trained.details["calibration"]["ece"]
    assert trained.run.exit_code == 0
    config = {key: value["value"] for key, value in trained.run.config.items()}
    assert config["train"]["epochs"] == 2
    assert config["manifest"]["dataset"] == "digits"
    assert config["code"]["versions"] == trained.summary["versions"]


def test_tables_of_a_training(trained: Trained) -> None:
    details, classes = trained.details, trained.details["classes"]
    matrix = trained.table("confusion_matrix_table")
    assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
    counts = {(actual, predicted): count for actual, predicted, count in matrix["data"]}
    for i, actual in enumerate(classes):
        assert [counts[actual, predicted] for predicted in classes] == details["confusion"][i]
    charts = trained.run.config["_wandb"]["value"]["visualize"]
    assert {name: chart["panel_config"]["panelDefId"] for name, chart in charts.items()} == {
        "evaluation/confusion_matrix": "wandb/confusion_matrix/v1",
        "evaluation/calibration": "wandb/line/v0",
    }
    bins = [[b["confidence"], b["accuracy"], b["count"]] for b in details["calibration"]["bins"] if b["count"]]
    assert trained.table("calibration_table")["data"] == bins
    by_class = trained.table("coefficients_by_class")
    assert by_class["columns"] == ["class", *(f"block{n + 1}/{name}" for n in (0, 1) for name in DIGITS[n])]
    assert [row[0] for row in by_class["data"]] == classes
    assert by_class["data"][7][4] == details["coefficients"][1]["by_class"][7][1]
    files = [artifact["files"] for artifact in trained.server.artifacts]
    (media,) = [found for found in files if "evaluation/wrong.table.json" in found]
    wrong = json.loads(media["evaluation/wrong.table.json"])
    assert wrong["columns"] == ["image", "label", "predicted", "confidence", "index"]
    for (image, label, predicted, *rest), answer in zip(wrong["data"], details["wrong"], strict=True):
        assert [label, predicted] == [classes[answer["label"]], classes[answer["predicted"]]]
        assert rest == [answer["confidence"], answer["index"]]
        assert pixels(media[image["path"]]) == pixels(base64.b64decode(answer["png"]))
    for name in ("loss", "accuracy"):
        sent = trained.run.uploads[trained.row()[f"plots/{name}"]["path"]]
        assert sent == (trained.run_dir / f"plots/{name}.png").read_bytes()


def test_checkpoints_as_artifacts(trained: Trained) -> None:
    models = [artifact for artifact in trained.server.artifacts if artifact["type"] == "model"]
    assert [sorted(model["aliases"]) for model in models[:2]] == [["latest", "step-5"], ["latest", "step-10"]]
    for model, step in zip(models[:2], (5, 10), strict=True):
        name = f"step-{step:08d}.pt"
        assert (model["name"], model["committed"]) == (f"checkpoint-{trained.run.name}", True)
        assert model["files"] == {name: (trained.run_dir / "checkpoints" / name).read_bytes()}
    leftover = {file.stat().st_size for file in (trained.run_dir / "wandb/artifacts").rglob("*") if file.is_file()}
    assert len(models[0]["files"][f"step-{5:08d}.pt"]) not in leftover, "a copy of a checkpoint stays after its upload"


def test_every_rank_samples_itself(trained: Trained) -> None:
    rows = [row for row in trained.run.history() if "elapsed_seconds" in row]
    (began,) = [row["elapsed_seconds"] for row in rows if "ranks/cpu_percent/rank0" in row][:1]
    assert began == 0
    for rank in (0, 1):
        text = (trained.run_dir / f"system/rank-{rank}.jsonl").read_text()
        written = [json.loads(line) for line in text.splitlines()]
        sent = [row for row in rows if f"ranks/cpu_percent/rank{rank}" in row]
        assert [row[f"ranks/cpu_percent/rank{rank}"] for row in sent] == [line["cpu_percent"] for line in written]
        assert all(0.1 < line["resident_gib"] < 10 for line in written)
        assert 0 < max(row[f"ranks/cpu_percent/rank{rank}"] for row in sent) < 1000


def test_the_key_is_nowhere(trained: Trained) -> None:
    run = trained.run
    assert KEY[:12] not in trained.output
    assert KEY[:12] not in json.dumps([run.attributes, run.config, run.lines])
    sent = [
        *run.uploads.values(),
        *(file for artifact in trained.server.artifacts for file in artifact["files"].values()),
    ]
    assert not [content for content in sent if KEY[:12].encode() in content]
    files = [file for file in trained.run_dir.parent.rglob("*") if file.is_file()]
    assert {"config.toml", "step-00000010.pt", f"run-{run.name}.wandb", "debug-core.log"} <= {
        file.name for file in files
    }
    assert not [file for file in files if KEY[:12].encode() in file.read_bytes()]


def test_upload_repeats_the_run(trained: Trained) -> None:
    done = trained.command(trained.run_dir, "--project", "again", "--entity", "us", module="dist_train upload")
    assert done.returncode == 0, done.stderr
    (again,) = [run for run in trained.server.runs.values() if run is not trained.run]
    url = f"{trained.server.url}/us/again/runs/{again.name}"
    assert done.stdout == f"{trained.run_dir}: {url}\n"
    assert done.stderr == f"W&B: {url}\n"
    assert (again.project, again.entity) == ("again", "us")
    assert again.attributes["displayName"] == trained.run.attributes["displayName"] == "a run"

    def rows(run: Run) -> list[Row]:
        """Rows in an order of their own, media by what they hold."""
        known = ("sha256", "nrows", "size")
        told = [
            {key: [value.get(k) for k in known] if isinstance(value, dict) else value for key, value in row.items()}
            for row in run.history()
        ]
        return sorted(told, key=lambda row: (row.get("step", 1e9), len(row), row.get("elapsed_seconds", 0)))

    assert rows(again) == rows(trained.run)
    assert again.metrics() == trained.run.metrics()
    assert again.exit_code == 0
    ours = {"name": f"checkpoint-{again.name}", "type": "model", "run": again.name}
    models = [artifact for artifact in trained.server.artifacts if {**artifact, **ours} == artifact]
    assert [len(model["files"]) for model in models] == [1, 1]


def test_upload_to_a_file_and_refusals(trained: Trained, tmp_path: Path) -> None:
    before = {*(trained.run_dir / "wandb").iterdir()}
    done = trained.command(trained.run_dir, "--offline", module="dist_train upload")
    assert done.returncode == 0, done.stderr
    (made,) = {*(trained.run_dir / "wandb").glob("offline-run-*")} - before
    assert done.stdout == f"{trained.run_dir}: {made}\n"
    with claimed(lock_path(trained.run_dir), 0):
        held = trained.command(trained.run_dir, module="dist_train upload")
    here = f"process {os.getpid()} on {os.uname().nodename}"
    told = f"dist_train: {trained.run_dir} is in use by {here}; wait for it, or stop it\n"
    assert (held.returncode, held.stdout, held.stderr) == (2, "", told)
    empty = trained.command(tmp_path, module="dist_train upload")
    told = f"dist_train: {tmp_path}: there is no config.toml in it; name the folder of a run\n"
    assert (empty.returncode, empty.stdout, empty.stderr) == (2, "", told)


# offline


def test_its_line_does_not_split_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """wandb takes longer to start than the whole training: the line comes below the table."""
    recorder = opened(tmp_path / "run", RecordConfig(wandb="offline"))
    train(recorder, 1, 2 * EPOCH)
    time.sleep(8)
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (3, "")
    train(recorder, 2 * EPOCH + 1, 3 * EPOCH)
    recorder.close(0)
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert err.startswith("W&B: offline run in ")


def test_offline_run_has_the_metrics(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    whole_run(run_dir, AUTO)
    told = f"W&B: offline run in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/offline-run-*\n"
    assert capfd.readouterr() == ("", told)
    records = offline_records(run_dir)
    of = {kind: [r[kind] for r in records if r["type"] == kind] for kind in {r["type"] for r in records}}
    rows = [own(history["item"]) for history in of["history"]]
    assert rows[:-1] == expected(run_dir)
    for name in ("loss", "accuracy"):
        picture = Path(str(rows[-1][f"plots/{name}.path"]))
        (folder,) = (run_dir / "wandb").glob("offline-run-*")
        assert (folder / "files" / picture).read_bytes() == (run_dir / f"plots/{name}.png").read_bytes()
    (run,) = of["run"]
    assert run["config"]["update"]["optim"] == {"lr": 0.5}
    assert (run["project"], run["run_group"], run["display_name"]) == ("dist_train", "a group", "run")
    assert run["tags"] == ["first", "second"]
    assert [end.get("exit_code", 0) for end in of["exit"]] == [0]


def test_variables_name_an_offline_run_which_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"WANDB_PROJECT": "mine", "WANDB_NAME": "a name", "WANDB_RUN_ID": "an-id", "WANDB_MODE": ""}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run_dir = tmp_path / "run"
    recorder = opened(run_dir, AUTO)
    train(recorder, 1, 6)
    recorder.close(errors.PREEMPTED)
    monkeypatch.setenv("WANDB_RUN_ID", "another-id")
    recorder = opened(run_dir, AUTO, resume_step=6)
    train(recorder, 7, 12)
    recorder.close(0)
    for name in variables:
        monkeypatch.delenv(name)
    runs = [
        record["run"] for number in (0, 1) for record in offline_records(run_dir, number) if record["type"] == "run"
    ]
    assert [(run["project"], run["display_name"], run["run_id"]) for run in runs] == [("mine", "a name", "an-id")] * 2


def test_a_disabled_wandb_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLED", "true")
    whole_run(tmp_path / "run", AUTO)
    assert not (tmp_path / "run/wandb").exists()


def test_tables_of_many_classes_are_whole(tmp_path: Path) -> None:
    """wandb cuts tables at 10,000 rows, which 101 classes exceed."""
    run_dir, count = tmp_path / "run", 200
    run_dir.mkdir()
    confusion = [[int((b - a) % count < 60) for b in range(count)] for a in range(count)]
    block = {"branches": ["3x3"], "mean": [1.0], "std": [0.0], "by_class": [[float(number)] for number in range(count)]}
    evaluation = {
        "classes": [f"class {number}" for number in range(count)],
        "split": "test",
        "images": 12_000,
        "confusion": confusion,
        "calibration": {"ece": 0.0, "bins": []},
        "coefficients": [block],
        "wrong": [],
    }
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    whole_run(run_dir, RecordConfig(wandb="offline", quiet=True))
    (file,) = run_dir.glob("wandb/offline-run-*/files/media/table/evaluation/confusion_matrix_table_*.table.json")
    rows = {(actual, predicted): n for actual, predicted, n in json.loads(file.read_text())["data"]}
    assert rows == {
        (f"class {a}", f"class {b}"): confusion[a][b] for a in range(count) for b in range(count) if confusion[a][b]
    }
    assert len({actual for actual, _ in rows}) == count


def test_the_machine_and_test_images_are_sent_unless_they_are_to_stay_here(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    wrong = {
        "png": base64.b64encode(image.getvalue()).decode(),
        "label": 0,
        "predicted": 1,
        "confidence": 0.9,
        "index": 5,
    }
    evaluation = {
        "classes": ["a", "b"],
        "split": "test",
        "images": 2,
        "confusion": [[1, 1], [0, 0]],
        "calibration": {"ece": 0.0, "bins": []},
        "coefficients": [{"branches": ["3x3"], "by_class": [[1.0], [1.0]]}],
        "wrong": [wrong],
    }
    private = [platform.node(), "/home/me/pictures", str(REPOSITORY), sys.executable, "0123abc"]
    for share in ("all", "metrics"):
        run_dir = tmp_path / share
        run_dir.mkdir()
        (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
        settings = RecordConfig(wandb="offline", quiet=True, share=share)
        data = {"dir": "/home/me/pictures/b", "source": "/home/me/pictures", "flip": "none"}
        config = {"data": data, "manifest": {"source": "/home/me/pictures"}, "code": {"git_commit": "0123abc"}}
        recorder = opened(run_dir, settings, run_config=config)
        train(recorder, 1, 12)
        recorder.finish({"test_accuracy": 0.6, "versions": {"torch": str(REPOSITORY)}, "git_commit": "0123abc"})
        recorder.close(0)
        (folder,) = run_dir.glob("wandb/offline-run-*")
        (record,) = folder.glob("*.wandb")
        sent = record.read_bytes()
        # as whole words: the host's name may be short
        found = [word for word in private if re.search(rf"(?<!\w){re.escape(word)}(?!\w)".encode(), sent)]
        assert found == (private if share == "all" else [])
        assert (folder / "files/requirements.txt").exists() == (share == "all")
        assert any(folder.glob("files/media/table/evaluation/wrong*")) == (share == "all")
        assert b"test_accuracy" in sent


def test_sync_gives_the_online_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Of a run that was preempted, moved, and resumed."""
    for mode in ("online", "offline"):
        monkeypatch.setenv("WANDB_MODE", mode)
        before, run_dir = tmp_path / f"{mode} before", tmp_path / mode
        recorder = opened(before, AUTO)
        train(recorder, 1, 6)
        recorder.close(errors.PREEMPTED)
        if mode == "online":
            assert server.only().preempting
        before.rename(run_dir)
        recorder = opened(run_dir, RecordConfig(quiet=True, artifacts="all"), resume_step=5)
        train(recorder, 6, 12)
        (run_dir / "step-00000012.pt").write_bytes(b"weights")
        recorder.checkpoint(run_dir / "step-00000012.pt")
        recorder.close(0)
    rows = expected(run_dir)
    assert [offline_rows(run_dir, number) for number in (0, 1)] == [rows[:7], rows[6:]]
    synced(run_dir)
    online, offline = server.runs.values()
    assert online.history() == offline.history() == rows[:7] + rows[6:]
    assert online.metrics() == offline.metrics()
    assert online.exit_code == offline.exit_code == 0
    models = [artifact["files"] for artifact in server.artifacts]
    assert models == [{"step-00000012.pt": b"weights"}] * 2


# online


def test_online_run_has_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: Server
) -> None:
    """Logged in by the key file alone."""
    monkeypatch.delenv("WANDB_API_KEY")
    host = server.url.removeprefix("http://")
    Path(os.environ["NETRC"]).write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    Path(os.environ["NETRC"]).chmod(0o600)
    run_dir = tmp_path / "run"
    whole_run(run_dir, AUTO)
    run_id = (run_dir / "wandb/run_id").read_text()
    assert capfd.readouterr() == ("", f"W&B: {server.url}/somebody/dist_train/runs/{run_id}\n")
    run = server.only()
    *rows, pictures = run.history()
    assert rows == expected(run_dir)
    assert set(pictures) == {"plots/loss", "plots/accuracy"}
    assert run.config["optim"] == {"value": {"lr": 0.5}}
    assert (run.name, run.attributes["groupName"], run.attributes["tags"]) == (run_id, "a group", ["first", "second"])
    assert (run.summary()["dataset"], run.summary()["test_accuracy"]) == ("digits", 0.6)
    assert run.exit_code == 0


def test_run_that_began_without_wandb_is_sent_whole_to_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """As W&B's agent starts a training: the run's id, the project and the settings are its own."""
    run_dir = tmp_path / "run"
    recorder = opened(run_dir)
    train(recorder, 1, 6)
    recorder.close(1)
    (tmp_path / "chosen.yaml").write_text("optim.lr:\n  value: 0.5\n")
    (run_dir / "system").mkdir()
    (run_dir / "system/rank-0.jsonl").write_text('{"time": 100.5, "host": "a", "cpu_percent": 90.0}\n')
    # a line torn by a kill, with the next start's first line behind it
    torn = '{"time": 101.0, "cpu_perc{"time": 105.0, "cpu_percent": 1.0}\n{"time": 110.5, "cpu_percent": 80.0}\n{"ti'
    (run_dir / "system/rank-1.jsonl").write_text(torn)
    for key, value in {
        "WANDB_SWEEP_ID": "a-sweep",
        "WANDB_RUN_ID": "agents",
        "WANDB_PROJECT": "swept",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "chosen.yaml"),
        "WANDB_SERVICE": "3-1-tcp-127.0.0.1-1",  # of the agent's process, which may end before the run does
    }.items():
        monkeypatch.setenv(key, value)
    recorder = opened(run_dir, RecordConfig(quiet=True, system="all"), resume_step=6)
    train(recorder, 7, 12)
    recorder.close(0)
    run = server.only()
    assert (run.name, run.project, run.attributes["sweep"]) == ("agents", "swept", "a-sweep")
    assert run.config["optim.lr"] == {"value": 0.5}
    samples = [row for row in run.history() if "elapsed_seconds" in row]
    assert samples == [
        {"elapsed_seconds": 0, "ranks/cpu_percent/rank0": 90},
        {"elapsed_seconds": 10, "ranks/cpu_percent/rank1": 80},
    ]
    assert [row for row in run.history() if row not in samples] == expected(run_dir)
    assert (run_dir / "wandb/run_id").read_text() == "agents"


def test_checkpoint_that_is_gone_is_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str], server: Server) -> None:
    recorder = opened(tmp_path, RecordConfig(quiet=True, artifacts="last"))
    train(recorder, 1, EPOCH)
    checkpoints = [tmp_path / f"step-0000000{step}.pt" for step in (3, 4)]
    checkpoints[1].write_bytes(b"weights")
    for checkpoint in checkpoints:
        recorder.checkpoint(checkpoint)  # not of the run's end
        recorder.checkpoint(checkpoint, last=True)
    recorder.close(0)
    (artifact,) = server.artifacts
    assert artifact["files"] == {"step-00000004.pt": b"weights"}
    told = f"W&B: {checkpoints[0]} no longer exists, and is not among the run's artifacts"
    assert told in capfd.readouterr().err.splitlines()


def test_failing_samples_do_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "INTERVAL", 0.02)
    path = tmp_path / "system/rank-3.jsonl"
    for start in (1, 2):  # the second appends to the file of the first
        with system_metrics.sampled(tmp_path, 3, torch.device("cpu")):
            until(lambda: path.exists() and path.read_text().count("\n") >= 5 * start)  # noqa: B023
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(line) == {"time", "host", "cpu_percent", "resident_gib"} for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    path.write_bytes(b"")
    with system_metrics.sampled(tmp_path, 3, torch.device("cuda")):  # whether there is one or not
        until(lambda: path.stat().st_size > 0)
    assert json.loads(path.read_text().splitlines()[0]).keys() > {"gpu_allocated_gib", "gpu_reserved_gib"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/system").write_text("in the way")
    with system_metrics.sampled(tmp_path / "other", 0, torch.device("cpu")):
        time.sleep(0.1)
    with system_metrics.sampled(tmp_path / "absent", 0, torch.device("cpu")):
        time.sleep(0.1)
    assert "system" not in [thread.name for thread in threading.enumerate()]


# faults


@pytest.mark.parametrize("fault", ["refuses", "never answers"])
def test_unreachable_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    monkeypatch.setattr(messages, "INIT_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        if fault == "refuses":
            listener.close()
        seconds = whole_run(tmp_path, AUTO)
    assert seconds["training"] < 1
    assert seconds["closing"] < 10
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("W&B: no online run (")
    assert second.startswith("W&B: offline run in ")
    assert offline_rows(tmp_path)[:-1] == expected(tmp_path)


@pytest.mark.parametrize("fault", ["dies", "slow", "errors"])
def test_server_fails_during_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: Server, fault: str
) -> None:
    """It costs the training nothing, and `wandb sync` brings every row once the server is back."""
    monkeypatch.setattr(messages, "FINISH_TIMEOUT", 1.0)
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    recorder = opened(tmp_path, AUTO)
    train(recorder, 1, 6)
    until(lambda: bool(server.runs) and len(server.only().history()) == 7)
    if fault == "dies":
        server.stop()
    server.delay = 3.0 if fault == "slow" else 0.0
    server.refused = lambda _: 500 if fault == "errors" else None
    begin = time.monotonic()
    train(recorder, 7, 12)
    assert time.monotonic() - begin < 1
    begin = time.monotonic()
    recorder.close(0)
    assert time.monotonic() - begin < 6
    again = f"wandb sync --include-online {tmp_path}/wandb/run-*"
    assert capfd.readouterr().err.splitlines()[1:] == [f"W&B: not all was uploaded in time; later: {again}"]
    server.delay, server.refused = 0.0, lambda _: None
    if fault == "dies":
        server.start()
    synced(tmp_path)
    assert distinct(server.only().history()) == expected(tmp_path)
    assert server.only().exit_code == 0


def test_slow_server(tmp_path: Path, capfd: pytest.CaptureFixture[str], server: Server) -> None:
    server.delay = 1.0
    seconds = whole_run(tmp_path, AUTO)
    assert seconds["training"] < 1
    assert seconds["closing"] < client.CLOSE_TIMEOUT
    assert capfd.readouterr().err.startswith(f"W&B: {server.url}")
    assert server.only().history()[:-1] == expected(tmp_path)


def test_online_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    whole_run(tmp_path, RecordConfig(wandb="online", quiet=True))
    first, second = capfd.readouterr().err.splitlines()
    assert first == "W&B: not logged in at http://127.0.0.1:1 (wandb login), so no online run"
    assert second.startswith("W&B: offline run in ")


@pytest.mark.parametrize("victim", ["the run's process", "wandb's helper"])
def test_hanging_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], victim: str
) -> None:
    monkeypatch.setattr(client, "CLOSE_TIMEOUT", 1.0)
    recorder = opened(tmp_path, RecordConfig(quiet=True, artifacts="all"))
    try:
        process, helper = processes(capfd)
        os.kill(process if victim == "the run's process" else helper, signal.SIGSTOP)
        begin = time.monotonic()
        train(recorder, 1, 3000)
        for _ in range(3000):  # more than a pipe holds
            recorder.checkpoint(tmp_path / "step-00000001.pt")
        assert time.monotonic() - begin < 2
    finally:
        recorder.close(0)
    assert time.monotonic() - begin < 5
    if victim == "the run's process":
        until(lambda: not Path(f"/proc/{helper}").exists())
    else:
        os.kill(helper, signal.SIGKILL)
    told = capfd.readouterr().err
    assert told == f"W&B: stopped, it did not finish in time; its files: {tmp_path}/wandb\n"
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 3000


def test_a_killed_wandb_process_is_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As by Slurm, which signals all processes of a job; what it had not written is not lost."""
    recorder = opened(tmp_path, AUTO)
    process, helper = processes(capfd)
    train(recorder, 1, 6)
    os.kill(helper, signal.SIGTERM)
    until(lambda: not children(process, "wandb-core"))
    train(recorder, 7, 12)
    recorder.close(errors.PREEMPTED)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2, told
    again, offline = told
    assert again.startswith("W&B: restarted after ")
    assert offline.startswith("W&B: offline run in ")
    assert offline_rows(tmp_path, 1) == expected(tmp_path)


def processes(capfd: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """The run's process and wandb's helper, once the offline run has begun."""
    until_told(capfd, "W&B: offline run in ")
    (process,) = children(os.getpid(), "dist_train.tracking.worker")
    (helper,) = children(process, "wandb-core")
    return process, helper


def children(parent: int, words: str) -> list[int]:
    """The children of a process whose command line contains `words`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or words not in (entry / "cmdline").read_text():
                continue
            status = (entry / "status").read_text()
        except OSError:  # it has ended
            continue
        if f"PPid:\t{parent}\n" in status:
            found.append(int(entry.name))
    return found


def until_told(capfd: pytest.CaptureFixture[str], words: str) -> None:
    told = ""

    def there() -> bool:
        nonlocal told
        told += capfd.readouterr().err
        return words in told

    until(there)


def test_run_ends_when_rank_0_is_killed(tmp_path: Path) -> None:
    code = f"""if True:
        import os, signal
        import recorded
        recorder = recorded.opened(recorded.Path({str(tmp_path)!r}), recorded.RecordConfig(quiet=True))
        recorded.train(recorder, 1, 12)
        recorded.Path({str(tmp_path / "group")!r}).write_text(str(recorder._wandb._process.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    until(lambda: not group_lives(int((tmp_path / "group").read_text())))
    records = offline_records(tmp_path)
    rows = [own(record["history"]["item"]) for record in records if record["type"] == "history"]
    assert rows == expected(tmp_path)
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [1]


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
