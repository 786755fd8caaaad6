"""The metrics, history and plots of a run folder."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import EPOCH, digests_at, loss_at, mixed_at, opened, train, whole_run

from dist_train import config
from dist_train.commands import plots as plots_command
from dist_train.config.settings import RecordConfig
from dist_train.errors import UserError, say
from dist_train.reports import plots
from dist_train.runs.history import append_history, read_history
from dist_train.runs.metrics import Row, best_eval, read_digests, read_metrics


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
    recorder.eval(step=1, epoch=1, test_loss=1.0, test_accuracy=0.5, coefficients=[], val_loss=2.0, val_accuracy=0.25)
    recorder.close(0)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert (row["val_loss"], row["val_accuracy"], row["test_loss"]) == (2.0, 0.25, 1.0)


@pytest.mark.parametrize("cut", [0, 3, 4, 5, 11, 12])
@pytest.mark.parametrize("torn", [b"", b'{"kind": "step", "st', b"\0\0\0\n\0"])
def test_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path, cut: int, torn: bytes) -> None:
    """A run that is killed after its checkpoint and resumed leaves the same file, byte for byte."""
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
    assert recorder.last_step == cut
    if cut and cut % EPOCH == 0:  # both are there already and are not doubled
        recorder.weights(step=cut, digests={})
        recorder.eval(step=cut, epoch=cut // EPOCH, test_loss=9.0, test_accuracy=0.9, coefficients=[])
    train(recorder, cut + 1, 3 * EPOCH)
    recorder.close(0)
    assert path.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    assert sorted(file.name for file in path.parent.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", ["missing", "short", "gap", "garbage"])
def test_incomplete_metrics_are_not_resumed(tmp_path: Path, damage: str) -> None:
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


def test_reader_distinguishes_a_torn_last_line_from_damage(tmp_path: Path) -> None:
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
            recorder.finish({})
        assert not (path.parent / "summary.json").exists()
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{path} cannot be written (File too large); free space on its disk: training continues")
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
    told = f"dist_train: {path} cannot be written (File too large); the line on the end is skipped\n"
    assert capsys.readouterr().err == told
    append_history(tmp_path, "end", outcome="done")
    first, second, third = read_history(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.pop("time"))
    assert first == {"event": "start", "step": 0, "environment": {"torch": "2.11.0", "device": "/dev/x"}}
    assert (second["step"], second["loss"], third["outcome"]) == (4, None, "done")
    append_history(tmp_path / "absent", "end")  # of a run folder that was moved: the metrics report that
    assert capsys.readouterr().err == ""


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_what_the_terminal_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "100")
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


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (100, ["epoch", "train loss", "train acc", "test loss", "test acc", "images/s", "elapsed s"]),
        (60, ["epoch", "train loss", "train acc", "test loss", "test acc", "images/s"]),
        (40, ["epoch", "train acc", "test loss", "test acc"]),
        (10, ["epoch", "test acc"]),
    ],
)
def test_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, shown: list[str]) -> None:
    """A row of the table is one line, and the bar keeps its beginning and the time left."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", table := Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    whole_run(tmp_path, RecordConfig(wandb="disabled"))
    header, *rows = table.getvalue().splitlines()
    assert header == "  ".join(shown)
    assert [len(row) for row in rows] == [len(header)] * 3
    assert len(header) <= max(columns, 15)
    bars = [part for part in terminal_text().split("\r") if "step 12/12, " in part]
    assert all("00:00 left" in bar and len(bar.rstrip()) <= columns for bar in bars) or columns < 60
    assert bars or columns < 60


def test_a_message_takes_the_place_of_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    recorder = opened(tmp_path, RecordConfig(wandb="disabled"))
    train(recorder, 1, 1)
    say("the loss is not finite")
    assert re.search(r"step [01]/12.*\r\x1b\[Kdist_train: the loss is not finite\n$", terminal_text())
    recorder.close(1)


def test_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    whole_run(tmp_path)
    assert capsys.readouterr().out + terminal_text() == ""


@pytest.mark.parametrize(("wandb", "mode"), [("disabled", "online"), ("auto", "disabled")])
def test_disabled_imports_no_wandb(tmp_path: Path, wandb: str, mode: str) -> None:
    code = f"""if True:
        import sys
        from pathlib import Path
        from dist_train.config.settings import RecordConfig
        from dist_train.training.recorder import Recorder
        config = RecordConfig(wandb={wandb!r})
        recorder = Recorder(
            Path({str(tmp_path)!r}), config, dataset="x", run_config={{}}, total_steps=1, resume_step=0
        )
        recorder.step(
            step=1, epoch=1.0, loss=1.0, lr=1.0, grad_norm=1.0, images_per_second=1.0, correct=1, images=1, flops=1
        )
        recorder.finish({{}})
        recorder.close(0)
        assert not {{"wandb", "torch", "matplotlib.pyplot"}} & set(sys.modules)
    """
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "WANDB_MODE": mode, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)
    assert not (tmp_path / "wandb").exists()


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


@pytest.mark.parametrize(
    ("last", "ticks"),
    [
        (0.5, [0, 0.5]),
        (1, [0, 1]),
        (2, [0, 1, 2]),
        (8.6, [0, 2, 4, 6, 8.6]),
        (10, [0, 2, 4, 6, 8, 10]),
        (22, [0, 5, 10, 15, 22]),
        (200, [0, 50, 100, 150, 200]),
    ],
)
def test_ticks_are_whole_epochs_and_the_last(last: float, ticks: list[float]) -> None:
    assert plots.epoch_ticks(last) == ticks


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_epochs_on_the_plots(epochs: int) -> None:
    steps, evals = made_up(epochs)
    of_loss = plots.loss_figure(steps, dataset="", name="")
    of_accuracy = plots.accuracy_figure(evals, dataset="", name="")
    for figure in (of_loss, of_accuracy):
        figure.draw_without_rendering()
    (top,) = of_loss.axes[0].child_axes
    for axis in (top.xaxis, of_accuracy.axes[0].xaxis):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert labels[-1] == str(epochs)
        assert all(label.isdigit() for label in labels)
    assert all(label.get_text().isdigit() for label in of_loss.axes[0].xaxis.get_ticklabels())


@pytest.mark.parametrize(("until", "last", "shaded"), [(1.0, 4, (2, 4)), (0.75, 4, (2, 3)), (1.0, 3, (2, 3))])
def test_the_part_with_selected_images_is_shaded(until: float, last: int, shaded: tuple[float, float]) -> None:
    """Of runs of four epochs, whole and interrupted."""
    chosen = config.load("digits", None, ["epochs=4", f"train.select={{fraction=0.25, start=0.5, until={until}}}"])
    all_images = config.load("digits", None, ["epochs=4"])
    steps, evals = made_up(last)
    for draw, rows, scale in ((plots.loss_figure, steps, 50), (plots.accuracy_figure, evals, 1)):
        assert not draw(rows, dataset="", name="", settings=all_images.train).axes[0].patches
        axes = draw(rows, dataset="", name="", settings=chosen.train).axes[0]
        (span,) = axes.patches
        assert span.get_label() == "trained on the hardest 25 %"
        box = span.get_extents().transformed(axes.transData.inverted())
        np.testing.assert_allclose((box.x0, box.x1), [scale * epoch for epoch in shaded])


def test_no_part_is_shaded_before_images_are_selected() -> None:
    settings = config.load("digits", None, ["epochs=4", "train.select={fraction=0.25, start=0.5}"]).train
    steps, evals = made_up(1)
    assert not plots.loss_figure(steps, dataset="", name="", settings=settings).axes[0].patches
    assert not plots.accuracy_figure(evals, dataset="", name="", settings=settings).axes[0].patches


def test_smoothing_keeps_a_constant_and_a_slope() -> None:
    line = np.arange(100.0)
    np.testing.assert_allclose(plots.smooth(np.full(100, 3.0), 7), 3.0)
    np.testing.assert_allclose(plots.smooth(line, 7)[7:-7], line[7:-7])


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
    assert plots_command.main([str(tmp_path)]) == 0
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
    again = f"dist-train plots {tmp_path}"
    assert capsys.readouterr().err == f"plots not drawn (no fonts); try again: {again}\n"
