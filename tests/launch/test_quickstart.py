"""The quick start's commands, as a new user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment


def on_a_machine_without_a_name() -> list[str]:
    """What starts a command where the machine's own name does not resolve; nothing where that takes root."""
    namespace = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]
    with suppress(FileNotFoundError):
        if subprocess.run([*namespace, "true"], capture_output=True).returncode == 0:
            return namespace
    return []


def quickstart(
    folder: Path, *arguments: str, inside: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*inside, sys.executable, "-m", "dist_train", "quickstart", *arguments],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_network_it_trains_digits_and_says_that_this_is_not_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    nowhere = "http://127.0.0.1:9"
    settings = ("epochs=1", "precision=fp32", "record.wandb=disabled")
    first = quickstart(tmp_path, *settings, XDG_CACHE_HOME=str(tmp_path), https_proxy=nowhere, HTTPS_PROXY=nowhere)
    assert first.returncode == 0, first.stderr
    assert "NOT CIFAR-10" in first.stderr
    assert "digits: test accuracy" in first.stdout
    assert "curves: runs/digits-seed0-" in first.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["dataset"] == "digits"
    assert not (tmp_path / "data" / "cifar10").exists()
    again = quickstart(tmp_path, "--preset", "digits", *settings, inside=on_a_machine_without_a_name())
    assert again.returncode == 0, again.stderr
    assert "is finished already" in again.stdout


def test_mistakes_end_it_before_any_work(tmp_path: Path) -> None:
    done = quickstart(tmp_path, "--preset", "digits", "epohcs=1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean" in done.stderr
    assert not list(tmp_path.iterdir())


def test_setup_is_quick_when_all_is_done() -> None:
    if not (REPOSITORY / ".venv" / ".dist_train-dev").exists():
        pytest.skip("the tests run outside the .venv that launch/setup.sh makes")
    start = time.monotonic()
    subprocess.run(["bash", "launch/setup.sh"], cwd=REPOSITORY, check=True)
    subprocess.run(["bash", "launch/setup.sh", "dev"], cwd=REPOSITORY, check=True)
    assert time.monotonic() - start < 2


def test_scripts_are_sound_shell() -> None:
    for script in ("launch/setup.sh", "launch/quickstart.sh", "tests/run.sh", ".ci/run"):
        subprocess.run(["bash", "-n", script], cwd=REPOSITORY, check=True)
