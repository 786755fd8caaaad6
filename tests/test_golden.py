"""The bits of short runs are the stored ones, and a change of them is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import golden
import pytest
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def machine() -> golden.Machine:
    return golden.this_machine()


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name, run in golden.RUNS.items() for ranks in run.ranks])
def test_the_bits_are_the_stored_ones(machine: golden.Machine, name: str, ranks: int) -> None:
    known = golden.stored(machine)
    if known is None or name not in known:
        pytest.skip(
            f"no golden digests of {name} for {machine}: compare with a commit by python -m tests.golden --compare "
            f"COMMIT, or store them by python -m tests.golden --write"
        )
    assert golden.difference(known[name], golden.digests(name, ranks)) == ""


def test_other_bits_are_named_with_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "STORED", tmp_path / "golden")
    machine = golden.Machine("2.9.0", "AVX2", "0123456789abcdef")
    right = {"step 1": "aa", "step 2": "bb", "evaluation after step 2": "cc"}
    assert golden.stored(machine) is None
    golden.write(machine, {"one": right})
    golden.write(machine, {"other": {"step 1": "dd"}})
    golden.write(golden.Machine("2.9.0", "AVX2", "fedcba9876543210"), {"one": {}})
    assert golden.stored(machine) == {"one": right, "other": {"step 1": "dd"}}
    assert golden.difference(right, dict(right)) == ""
    assert "at step 2: bb expected, b0 computed" in golden.difference(right, {**right, "step 2": "b0"})
    assert "at evaluation after step 2: cc expected, nothing computed" in golden.difference(
        right, {"step 1": "aa", "step 2": "bb"}
    )
    assert "more than expected: step 3" in golden.difference(right, {**right, "step 3": "ee"})


def test_two_commits_are_compared_on_this_machine(tmp_path: Path) -> None:
    """Of a repository of its own, in which one line of the trainer is changed."""
    copy = tmp_path / "repository"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{REPOSITORY}", copy], check=True)

    def compared() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.golden", "--compare", "HEAD", "digits-fp32"]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)

    changed = copy / "dist_train" / "randomness.py"
    changed.write_text(changed.read_text().replace("repr((seed, purpose, *numbers))", "repr((purpose, *numbers))"))
    done = compared()
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("digits-fp32: first different at step 1: ")
