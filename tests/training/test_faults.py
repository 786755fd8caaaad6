"""Faults at random moments do not change the result of a run; and the harness that checks this can fail."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from conftest import REPOSITORY, environment

from dist_train.runs import checkpoint


def test_faults_at_random_moments_do_not_change_the_result(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "faults"
    command = [sys.executable, "-m", "tests.faults", "--faults", "12", "--seed", "15186", "--epochs", "2"]
    done = subprocess.run(
        [*command, "--data", str(digits), "--out", str(out)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n12 faults (" in done.stdout
    assert "all weights and records equal" in done.stdout
    assert not list(out.glob("run-*"))  # what is good is not kept


def written(folder: Path, *steps: int, loss: float = 2.0, weights: str = "right") -> Path:
    """A folder of a run that is finished."""
    folder.mkdir()
    rows = [{"kind": "step", "step": step, "loss": loss, "images_per_second": step * 1.5} for step in steps]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps({**dict.fromkeys(faults.RESULTS, 1), "weights_sha256": weights}))
    return folder


def test_runs_that_differ_are_distinguished_from_equal_ones(tmp_path: Path) -> None:
    right = written(tmp_path / "right", 1, 2, 3)
    with (right / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert faults.check_finished(right, right) == []
    assert faults.check_record(faults.record(right)[:2], faults.record(right)) == []
    wrong = {
        "step 2 is recorded 2 times": written(tmp_path / "twice", 1, 2, 2, 3),
        "the record lacks step 2": written(tmp_path / "lacks", 1, 3),
        "the record ends with line 2 of 3": written(tmp_path / "short", 1, 2),
        "instead of\n  nothing": written(tmp_path / "long", 1, 2, 3, 4),
        '"loss": 2.5': written(tmp_path / "loss", 1, 2, 3, loss=2.5),
        "weights_sha256 is wrong instead of right": written(tmp_path / "weights", 1, 2, 3, weights="wrong"),
    }
    for said, folder in wrong.items():
        (found,) = faults.check_finished(folder, right)
        assert said in found
    (right / "summary.json").unlink()
    assert faults.check_finished(right, right) == ["the run is finished and has no summary"]
    (right / "metrics.jsonl").write_text('{"kind": "step"}\n')
    assert "holds a line that is none" in faults.check_record(faults.record(right), [])[0]


def test_only_whole_checkpoints_are_good(tmp_path: Path) -> None:
    for step in (5, 10):
        checkpoint.save(tmp_path / "checkpoints", step, {"step": step}, 2)
    assert faults.good_checkpoints(tmp_path) == [5, 10]
    for how in ("truncated", "altered a byte of", "removed the checksum of"):
        checkpoint.save(tmp_path / "checkpoints", 10, {"step": 10}, 2)
        assert faults.do_damage(tmp_path, how, random.Random(0)) == "step-00000010.pt"
        assert faults.good_checkpoints(tmp_path) == [5]


@pytest.mark.parametrize(
    ("fault", "codes", "finished", "caught", "good"),
    [
        ("", [0, 0], True, False, True),
        ("", [0, 0], False, False, False),
        ("", [0, 1], True, False, False),
        ("pause", [1, 1], False, False, False),
        ("kill one", [1, -9], False, False, True),
        ("kill one", [0, -9], True, False, True),
        ("kill one", [0, -9], False, False, False),
        ("kill one", [-11, -9], False, False, False),
        ("kill one", [2, -9], False, False, False),
        ("kill all", [-9, -9], False, False, True),
        ("SIGTERM", [75, 75], False, True, True),
        ("SIGTERM", [75, 0], True, True, False),
        ("SIGTERM", [1, -15], False, False, True),  # before there was a handler
        ("SIGTERM", [1, -15], False, True, False),
        ("SIGUSR1", [75, 1], False, True, False),
        ("hang", [1, -9], False, False, True),
    ],
)
def test_exit_codes_must_follow_from_the_fault(
    fault: str, codes: list[int], finished: bool, caught: bool, good: bool
) -> None:
    seen = faults.Seen(fault=1.0, victim=1, caught=caught, codes=codes)
    assert (faults.check_codes(fault, seen, finished) == []) == good


def test_a_rank_that_stays_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LAUNCH", 1)
    sleeper = os.posix_spawnp("sleep", ["sleep", "60"], os.environ)

    class Group(faults.Forked):
        def __init__(self) -> None:
            self._codes, self._running = {}, {0: sleeper}

    launch = faults.Launch(Group(), faults.Folder(tmp_path, 0), tmp_path / "log", None, 0.0)
    with pytest.raises(faults.FoundError, match="rank 0 is still there"):
        launch.watch()
    assert launch.group.codes() == [-signal.SIGKILL]
