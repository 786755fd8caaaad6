"""The run folder's record, its plots and its W&B run, the last with the real SDK and a server made here."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train import plots, wandb_run
from dist_train.errors import UserError
from dist_train.record import (
    RecordConfig,
    Recorder,
    Row,
    append_history,
    best_eval,
    read_digests,
    read_history,
    read_metrics,
)

EPOCH = 4  # steps
OFF = RecordConfig(wandb="disabled", quiet=True)
AUTO = RecordConfig(quiet=True, group="a group", tags=["first", "second"])


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


def opened(run_dir: Path, config: RecordConfig = OFF, resume_step: int = 0) -> Recorder:
    return Recorder(
        run_dir,
        config,
        dataset="digits",
        run_config={"optim": {"lr": 0.5}},
        total_steps=3 * EPOCH,
        resume_step=resume_step,
    )


def loss_at(step: int) -> float:
    return 3.0 / (step + 0.1)


def digests_at(step: int) -> dict[str, str]:
    return {"stem.weight": f"{step:016x}", "output.bias": f"{7 * step:016x}"}


def mixed_at(step: int) -> list[list[list[float]]]:
    """Mean and deviation of each coefficient of two blocks, of two convolutions and of one."""
    return [[[0.5, 0.25], [1.0 / step, 0.125]], [[float(step), 0.0]]]


def train(recorder: Recorder, first: int, last: int, loss: Callable[[int], float] = loss_at) -> None:
    """Steps `first` to `last`, with digests and an evaluation after each epoch."""
    for step in range(first, last + 1):
        recorder.step(
            step=step,
            epoch=step / EPOCH,
            loss=loss(step),
            lr=0.1 * step,
            grad_norm=2.0 / step,
            flops=320 * step,
            images_per_second=1000.0 + step,
            correct=7 * step % 32,
            images=32,
        )
        if step % EPOCH == 0:
            recorder.weights(step=step, digests=digests_at(step))
            recorder.eval(
                step=step, epoch=step // EPOCH, test_loss=1 / step, test_accuracy=step / 20, coefficients=mixed_at(step)
            )


def whole_run(run_dir: Path, config: RecordConfig = OFF) -> Row:
    """A run of three epochs from start to end. Returns what was measured of it."""
    begin = time.monotonic()
    recorder = opened(run_dir, config)
    train(recorder, 1, 3 * EPOCH)
    seconds = {"training": time.monotonic() - begin}
    recorder.finish({"test_accuracy": 0.6, "ratio": math.inf}, plots.draw)
    begin = time.monotonic()
    recorder.close(0)
    return {**seconds, "closing": time.monotonic() - begin}


def test_lines(tmp_path: Path) -> None:
    whole_run(tmp_path / "run")
    steps, evals = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 3 * EPOCH + 1))
    assert steps[4] == {
        "kind": "step",
        "step": 5,
        "epoch": 1.25,
        "loss": loss_at(5),
        "lr": 0.5,
        "grad_norm": 0.4,
        "images_per_second": 1005.0,
        "correct": 3,
        "images": 32,
        "flops": 1600,
    }
    assert evals[1] == {
        "kind": "eval",
        "step": 8,
        "epoch": 2,
        "train_loss": pytest.approx(sum(map(loss_at, range(5, 9))) / 4),
        "train_accuracy": (35 % 32 + 42 % 32 + 49 % 32 + 56 % 32) / 128,
        "test_loss": 0.125,
        "test_accuracy": 0.4,
        "coefficients": mixed_at(8),
    }
    assert read_digests(tmp_path / "run/metrics.jsonl") == {step: digests_at(step) for step in (4, 8, 12)}
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert kinds == ([*["step"] * EPOCH, "weights", "eval"] * 3)
    assert best_eval(evals) == evals[2]
    assert best_eval([]) is None
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary == {"dataset": "digits", "test_accuracy": 0.6, "ratio": None}


def test_validation_is_recorded(tmp_path: Path) -> None:
    recorder = opened(tmp_path)
    train(recorder, 1, 1)
    row = recorder.eval(
        step=1, epoch=1, test_loss=1.0, test_accuracy=0.5, coefficients=[], val_loss=2.0, val_accuracy=0.25
    )
    recorder.close(0)
    assert row["val_loss"] == 2.0
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == [row]


@pytest.mark.parametrize("cut", [0, 3, 4, 5, 11, 12])
@pytest.mark.parametrize("torn", [b"", b'{"kind": "step", "st', b"\0\0\0\n\0"])
def test_resumed_record_is_the_undisturbed_one(tmp_path: Path, cut: int, torn: bytes) -> None:
    """A run killed behind its checkpoint and gone on with leaves the same file, byte for byte."""
    recorder = opened(tmp_path / "straight")
    train(recorder, 1, 3 * EPOCH)
    recorder.close(0)
    path = tmp_path / "killed/metrics.jsonl"
    recorder = opened(path.parent)
    train(recorder, 1, min(cut + 3, 3 * EPOCH))
    recorder.close(1)
    with path.open("ab") as file:
        file.write(torn)
    recorder = opened(path.parent, resume_step=cut)
    assert [row["step"] for row in recorder.evals] == list(range(EPOCH, cut + 1, EPOCH))
    if cut and cut % EPOCH == 0:  # both are there already and are not doubled
        recorder.weights(step=cut, digests={})
        recorder.eval(step=cut, epoch=cut // EPOCH, test_loss=9.0, test_accuracy=0.9, coefficients=[])
    train(recorder, cut + 1, 3 * EPOCH)
    recorder.close(0)
    assert path.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    assert sorted(file.name for file in path.parent.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", ["missing", "short", "gap", "garbage"])
def test_incomplete_record_is_not_resumed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    recorder = opened(tmp_path)
    train(recorder, 1, 6)
    recorder.close(1)
    lines = path.read_text().splitlines(keepends=True)
    content = {"short": lines[:4], "gap": lines[:2] + lines[3:], "garbage": [*lines[:2], "}\n", *lines[3:]]}
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("".join(content[damage]))
    with pytest.raises(UserError, match=r"step 0|step 4|from step 2 to step 4|step 2"):
        opened(tmp_path, resume_step=6)
    if damage != "missing":
        assert path.read_text() == "".join(content[damage]), "a refused file is left as it was"


def test_lines_come_in_order(tmp_path: Path) -> None:
    recorder = opened(tmp_path)
    train(recorder, 1, 2)
    with pytest.raises(ValueError, match="step 4 was recorded after step 2"):
        train(recorder, 4, 4)
    with pytest.raises(ValueError, match="after step 4 came when step 2"):
        recorder.eval(step=4, epoch=1, test_loss=1.0, test_accuracy=0.5, coefficients=[])
    with pytest.raises(ValueError, match="after step 1 came when step 2"):
        recorder.weights(step=1, digests={})
    recorder.close(1)


def test_reader_tells_a_torn_end_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    recorder = opened(tmp_path)
    train(recorder, 1, 3 * EPOCH)
    recorder.close(0)
    path.write_bytes(path.read_bytes()[:-5])
    assert len(read_metrics(path)[1]) == 2
    path.write_text(path.read_text().replace('"step": 2,', '"step": 2', 1))
    with pytest.raises(ValueError, match="line 2 of"):
        read_metrics(path)


def test_not_finite_is_null(tmp_path: Path) -> None:
    def loss(step: int) -> float:
        return {2: math.nan, 6: math.inf}.get(step, 1.0)

    recorder = opened(tmp_path / "straight")
    train(recorder, 1, 12, loss)
    recorder.close(0)
    recorder = opened(tmp_path / "resumed")
    train(recorder, 1, 7, loss)
    recorder.close(1)
    recorder = opened(tmp_path / "resumed", resume_step=7)
    train(recorder, 8, 12, loss)
    recorder.close(0)
    steps, evals = read_metrics(tmp_path / "straight/metrics.jsonl")
    assert [row["loss"] for row in steps[:7]] == [1.0, None, 1.0, 1.0, 1.0, None, 1.0]
    assert [row["train_loss"] for row in evals] == [None, None, 1.0]
    assert (tmp_path / "resumed/metrics.jsonl").read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()


@contextmanager
def full_disk(path: Path, room: int) -> Iterator[None]:
    """Let the file grow by `room` bytes at the most."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_run(tmp_path / "straight")
    path = tmp_path / "full/metrics.jsonl"
    recorder = opened(path.parent)
    train(recorder, 1, 2)
    recorder.flush()
    before = path.read_text()
    with full_disk(path, room=300):  # for one line and a part of another
        train(recorder, 3, 6)
        assert path.read_text().startswith(before)
        assert [row["step"] for row in read_metrics(path)[0]] == [1, 2, 3]
        assert path.read_bytes().endswith(b"\n"), "no torn line"
        with pytest.raises(OSError, match=r"File too large: .*/full/metrics\.jsonl"):
            recorder.flush()
        with pytest.raises(OSError, match="File too large"):
            recorder.finish({}, plots.draw)
        assert not (path.parent / "summary.json").exists()
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{path} cannot be written (File too large); free space on its disk: training goes on")
    train(recorder, 7, 7)
    assert capsys.readouterr().err == f"{path} can be written again; none of its lines is missing\n"
    with full_disk(path, room=0):
        train(recorder, 8, 12)
    recorder.close(1)  # the last to come is this
    assert path.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()


def test_no_line_is_lost_doubled_or_misplaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread flushes all the time, writes fail or are partial, and lost bytes show at the fsync only."""
    recorder = opened(tmp_path / "straight")
    train(recorder, 1, 2000)
    recorder.close(0)
    path = tmp_path / "faulty/metrics.jsonl"
    recorder = opened(path.parent)
    write, synced, chance = os.pwrite, 0, random.Random(0)

    def faulty_write(file: int, data: bytes, offset: int) -> int:
        if chance.random() < 0.2:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = len(data) if chance.random() < 0.5 else chance.randint(1, len(data))
        return write(file, data[:part], offset)

    def faulty_sync(file: int) -> None:
        nonlocal synced
        size = os.fstat(file).st_size
        if chance.random() < 0.5:
            write(file, bytes(max(0, size - synced)), synced)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        synced = size

    def flush_on() -> None:
        while not done.is_set():
            with suppress(OSError):
                recorder.flush()
                flushed.append(len(path.read_bytes()))

    monkeypatch.setattr(os, "pwrite", faulty_write)
    monkeypatch.setattr(os, "fsync", faulty_sync)
    done, flushed = threading.Event(), list[int]()
    thread = threading.Thread(target=flush_on)
    thread.start()
    train(recorder, 1, 2000)
    done.set()
    thread.join()
    monkeypatch.undo()
    recorder.flush()
    recorder.close(0)
    assert path.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    assert len(set(flushed)) > 10, "it did flush in between"


def test_history_survives_kills_and_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_history(tmp_path) == []
    append_history(tmp_path, "start", step=0, environment={"torch": "2.11.0", "device": Path("/dev/x")})
    path = tmp_path / "history.jsonl"
    with path.open("ab") as file:
        file.write(b'{"event": "en\xff')  # a kill in the middle of a write
    append_history(tmp_path, "start", step=4, loss=math.nan)
    with full_disk(path, room=10):
        append_history(tmp_path, "end", outcome="failed")
    assert capsys.readouterr().err == f"{path} cannot be written (File too large); its line on the end is left out\n"
    append_history(tmp_path, "end", outcome="done")
    first, second, third = read_history(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.pop("time"))
    assert first == {"event": "start", "step": 0, "environment": {"torch": "2.11.0", "device": "/dev/x"}}
    assert (second["step"], second["loss"], third["outcome"]) == (4, None, "done")
    append_history(tmp_path / "absent", "end")
    assert "No such file or directory" in capsys.readouterr().err


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_what_the_terminal_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    whole_run(tmp_path, RecordConfig(wandb="disabled"))
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split()[:3] == ["epoch", "train", "loss"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert all(len(row) == len(header) for row in rows)
    assert "20.00 %" in rows[0]
    assert err == ""
    if terminal:
        assert re.search(r"step 12/12, loss 0\.248, train acc [\d.]+ %, 1012 images/s, 00:00 left", terminal_text())


def terminal_text() -> str:
    assert isinstance(sys.stderr, StringIO)
    return sys.stderr.getvalue()


def test_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    whole_run(tmp_path)
    assert capsys.readouterr().out + terminal_text() == ""


@pytest.mark.parametrize(("wandb", "mode"), [("disabled", "online"), ("auto", "disabled")])
def test_disabled_imports_no_wandb(tmp_path: Path, wandb: str, mode: str) -> None:
    code = f"""if True:
        import sys
        from pathlib import Path
        from dist_train.record import *
        config = RecordConfig(wandb={wandb!r})
        recorder = Recorder(
            Path({str(tmp_path)!r}), config, dataset="x", run_config={{}}, total_steps=1, resume_step=0
        )
        recorder.step(
            step=1, epoch=1.0, loss=1.0, lr=1.0, grad_norm=1.0, images_per_second=1.0, correct=1, images=1, flops=1
        )
        recorder.finish({{}}, lambda *_, **__: [])
        recorder.close(0)
        assert not {{"wandb", "torch", "matplotlib.pyplot"}} & set(sys.modules)
    """
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "WANDB_MODE": mode, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)
    assert not (tmp_path / "wandb").exists()


# W&B


def offline_records(run_dir: Path, number: int = 0) -> list[Row]:
    """The records of a run's offline file, read by W&B's own tool."""
    folder = sorted((run_dir / "wandb").glob("offline-run-*"))[number]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def offline_rows(run_dir: Path, number: int = 0) -> list[Row]:
    records = offline_records(run_dir, number)
    return [own(record["history"]["item"]) for record in records if record["type"] == "history"]


def own(row: Row) -> Row:
    return {key: value for key, value in row.items() if not key.startswith("_")}


def expected_rows(run_dir: Path) -> list[Row]:
    """The rows W&B shall have, from the record."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind, step, epoch = row.pop("kind"), row.pop("step"), row.get("epoch")
        if kind == "weights":
            continue
        if kind == "step":
            row = {f"train/{key}": row[key] for key in ("epoch", "loss", "lr", "images_per_second")}
            rows.append({"step": step, **row})
        else:
            del row["epoch"]
            rows.append({"step": step, "epoch": epoch, **{f"eval/{key}": value for key, value in row.items()}})
    return rows


def test_offline_run_holds_the_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    whole_run(run_dir, AUTO)
    told = f"W&B: offline run in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/offline-run-*\n"
    assert capfd.readouterr() == ("", told)
    records = offline_records(run_dir)
    of = {kind: [r[kind] for r in records if r["type"] == kind] for kind in {r["type"] for r in records}}
    rows = [own(history["item"]) for history in of["history"]]
    assert rows[:-1] == expected_rows(run_dir)
    for name in ("loss", "accuracy"):
        picture = Path(str(rows[-1][f"plots/{name}.path"]))
        (folder,) = (run_dir / "wandb").glob("offline-run-*")
        assert (folder / "files" / picture).read_bytes() == (run_dir / f"plots/{name}.png").read_bytes()
    (run,) = of["run"]
    assert run["config"]["update"]["optim"] == {"lr": 0.5}
    assert (run["project"], run["run_group"], run["display_name"]) == ("dist_train", "a group", "run")
    assert run["tags"] == ["first", "second"]
    axes = {metric["glob_name"]: metric["step_metric"] for metric in of["metric"] if "glob_name" in metric}
    assert axes == {"train/*": "step", "eval/*": "epoch"}
    assert [end.get("exit_code", 0) for end in of["exit"]] == [0]


def test_resumed_offline_run_keeps_its_id(tmp_path: Path) -> None:
    """Also when the run folder has been moved."""
    first, moved = tmp_path / "first", tmp_path / "moved"
    recorder = opened(first, AUTO)
    train(recorder, 1, 6)
    recorder.close(1)
    first.rename(moved)
    time.sleep(1.0)  # W&B's folders are named by the second
    recorder = opened(moved, AUTO, resume_step=5)
    train(recorder, 6, 12)
    recorder.close(0)
    assert len({path.name.split("-")[-1] for path in (moved / "wandb").glob("offline-run-*")}) == 1
    rows = expected_rows(moved)
    assert offline_rows(moved, 0) == rows[:7]
    assert offline_rows(moved, 1) == rows[6:]


class Server(ThreadingHTTPServer):
    """As much of a W&B server as an online run needs to come to its end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.runs: list[Row] = []
        self.lines: dict[str, dict[int, str]] = {}
        self.exit_code: int | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """W&B's client closes idle connections."""

    def history(self) -> list[Row]:
        lines = self.lines.get("wandb-history.jsonl", {})
        return [own(json.loads(lines[number])) for number in sorted(lines)]

    def answer(self, operation: str, variables: Row) -> Row:
        entity = {"id": "e", "name": "somebody"}
        if operation == "Viewer":
            return {"viewer": {**entity, "entity": "somebody", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "p", "name": "dist_train", "entity": entity, "bucket": None}}
        if operation == "UpsertBucket":
            self.runs.append(variables)
            names = {"id": "r", "name": variables["name"], "displayName": variables["displayName"]}
            project = {"id": "p", "name": "dist_train", "entity": entity}
            bucket = {**names, "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"inserted": True, "bucket": bucket}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        """Not a line on stderr for each request."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            if self.path.endswith("/file_stream"):
                for name, part in (body.get("files") or {}).items():
                    lines = self.server.lines.setdefault(name, {})
                    lines.update(enumerate(part["content"], part["offset"]))
                if body.get("complete"):
                    self.server.exit_code = body["exitcode"]
                self.reply({})
                return
            operation = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            assert operation
            data = self.server.answer(operation[1], body.get("variables") or {})
        self.reply({"data": data} if data else {"errors": [{"message": "no such thing here"}]})

    def reply(self, answer: Row) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def log_in(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)


def test_online_run_holds_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: Server
) -> None:
    """Logged in by the key file alone."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    host = server.url.removeprefix("http://")
    Path(os.environ["NETRC"]).write_text(f"machine {host}\n  login user\n  password {'x' * 40}\n")
    Path(os.environ["NETRC"]).chmod(0o600)
    run_dir = tmp_path / "run"
    whole_run(run_dir, AUTO)
    run_id = (run_dir / "wandb/run_id").read_text()
    assert capfd.readouterr() == ("", f"W&B: {server.url}/somebody/dist_train/runs/{run_id}\n")
    *rows, pictures = server.history()
    assert rows == expected_rows(run_dir)
    assert set(pictures) == {"plots/loss", "plots/accuracy"}
    assert json.loads(server.runs[0]["config"])["optim"] == {"value": {"lr": 0.5}}
    assert server.runs[0]["name"] == run_id
    summary = json.loads(server.lines["wandb-summary.json"][0])
    assert (summary["dataset"], summary["test_accuracy"]) == ("digits", 0.6)
    assert server.exit_code == 0


@pytest.mark.parametrize("fault", ["refuses", "never answers"])
def test_unreachable_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        log_in(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}")
        if fault == "refuses":
            listener.close()
        seconds = whole_run(tmp_path, AUTO)
    assert seconds["training"] < 1
    assert seconds["closing"] < 10
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("W&B: no online run (")
    assert second.startswith("W&B: offline run in ")
    assert offline_rows(tmp_path)[:-1] == expected_rows(tmp_path)


def test_server_lost_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], server: Server
) -> None:
    monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT", 1.0)
    log_in(monkeypatch, server.url)
    recorder = opened(tmp_path, AUTO)
    until_told(capfd, f"W&B: {server.url}")
    server.shutdown()
    server.server_close()
    train(recorder, 1, 12)
    begin = time.monotonic()
    recorder.close(0)
    assert time.monotonic() - begin < 6
    command = f"wandb sync --include-online {tmp_path}/wandb/run-*"
    assert capfd.readouterr().err.splitlines() == [f"W&B: not all was uploaded in time; later: {command}"]


def test_online_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    whole_run(tmp_path, RecordConfig(wandb="online", quiet=True))
    first, second = capfd.readouterr().err.splitlines()
    assert first == "W&B: not logged in at http://127.0.0.1:1 (wandb login), so no online run"
    assert second.startswith("W&B: offline run in ")


@pytest.mark.parametrize(
    ("victim", "end"),
    [
        ("the run's process", signal.SIGSTOP),
        ("wandb's helper", signal.SIGKILL),
        ("wandb's helper", signal.SIGSTOP),
    ],
)
def test_dead_or_hanging_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    victim: str,
    end: signal.Signals,
) -> None:
    monkeypatch.setattr(wandb_run, "CLOSE_TIMEOUT", 1.0)
    recorder = opened(tmp_path, AUTO)
    try:
        until_told(capfd, "W&B: offline run in ")
        (process,) = children(os.getpid(), "dist_train.wandb_run")
        (helper,) = children(process, "wandb-core")
        os.kill(process if victim == "the run's process" else helper, end)
        begin = time.monotonic()
        train(recorder, 1, 3000)
        assert time.monotonic() - begin < 2
    finally:
        recorder.close(0)
    assert time.monotonic() - begin < 5
    if victim == "the run's process":
        until(lambda: not Path(f"/proc/{helper}").exists())
    elif end == signal.SIGSTOP:
        os.kill(helper, signal.SIGKILL)
    told = capfd.readouterr().err
    if end == signal.SIGSTOP:
        assert told == f"W&B: stopped, it did not come to an end; what it has: {tmp_path}/wandb\n"
    else:
        assert told.startswith("W&B: stopped, ConnectionResetError")
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 3000


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
        import tests.test_record as here
        recorder = here.opened(here.Path({str(tmp_path)!r}), here.AUTO)
        here.train(recorder, 1, 12)
        here.Path({str(tmp_path / "group")!r}).write_text(str(recorder._wandb._process.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
    }
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL
    until(lambda: not group_lives(int((tmp_path / "group").read_text())))
    records = offline_records(tmp_path)
    rows = [own(record["history"]["item"]) for record in records if record["type"] == "history"]
    assert rows == expected_rows(tmp_path)
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


# plots


def made_up(epochs: int, spike_at: int = 0) -> tuple[list[Row], list[Row]]:
    steps = [
        {"kind": "step", "step": s, "epoch": s / 50, "loss": 100.0 if s == spike_at else 2 * 0.999**s}
        for s in range(1, 50 * epochs + 1)
    ]
    evals = [
        {"kind": "eval", "step": 50 * e, "epoch": e, "train_accuracy": 1 - 0.5 / e, "test_accuracy": accuracy}
        for e, accuracy in enumerate([0.5, 0.75, 0.625, 0.7][:epochs], 1)
    ]
    return steps, evals


def test_loss_figure_draws_every_batch() -> None:
    steps, _ = made_up(4, spike_at=77)
    steps[20]["loss"] = None
    figure = plots.loss_figure(steps, dataset="digits", name="a run")
    (axes,) = figure.axes
    each, smooth, bad = axes.lines
    np.testing.assert_array_equal(each.get_xdata(), np.arange(1, 201))
    np.testing.assert_array_equal(each.get_ydata(), [math.nan if r["loss"] is None else r["loss"] for r in steps])
    assert axes.get_ylim()[1] > 100, "the spike is in the picture"
    assert np.max(smooth.get_ydata()) < 100
    assert np.asarray(bad.get_xdata()).tolist() == [21]
    assert "digits" in axes.get_title("left")
    assert "CIFAR" not in axes.get_title("left")


def test_smoothing_keeps_a_constant_and_a_slope() -> None:
    line = np.arange(100.0)
    np.testing.assert_allclose(plots._smooth(np.full(100, 3.0), 7), 3.0)
    np.testing.assert_allclose(plots._smooth(line, 7)[7:-7], line[7:-7])


def test_accuracy_figure_marks_best_and_last() -> None:
    _, evals = made_up(4)
    figure = plots.accuracy_figure(evals, dataset="cifar10", name="a run")
    (axes,) = figure.axes
    drawn = {str(line.get_label()): line for line in axes.lines}
    np.testing.assert_array_equal(drawn["test"].get_ydata(), [50, 75, 62.5, 70])
    np.testing.assert_array_equal(drawn["train"].get_xdata(), [1, 2, 3, 4])
    best = drawn["best test: 75.00 %, epoch 2"]
    assert (np.asarray(best.get_xdata()).tolist(), np.asarray(best.get_ydata()).tolist()) == ([2], [75.0])
    assert {"test 70.00 %", "train 87.50 %"} <= {text.get_text() for text in axes.texts}
    assert "CIFAR-10" in axes.get_title("left")


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_drawn_files(tmp_path: Path, epochs: int, capsys: pytest.CaptureFixture[str]) -> None:
    steps, evals = made_up(epochs)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps + evals))
    (tmp_path / "summary.json").write_text('{"dataset": "digits"}')
    plots.main([str(tmp_path)])
    files = capsys.readouterr().out.split()
    assert files == [str(tmp_path / "plots" / name) for name in ("loss.png", "accuracy.png")]
    for file in files:
        head = Path(file).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1200, 720)


def test_failing_plots_do_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "draw", draw)
    whole_run(tmp_path)
    again = f"python -m dist_train.plots {tmp_path}"
    assert capsys.readouterr().err == f"plots not drawn (no fonts); try again: {again}\n"
