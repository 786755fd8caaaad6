"""Checkpoints appear whole or not at all, and damaged ones are set aside."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from dist_train import checkpoint


def saved(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"step": step, "weights": torch.full((3,), float(step))}, keep)


def test_the_newest_are_kept_with_checksums_that_sha256sum_takes(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 100, 15)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000015.pt", "step-00000100.pt"]
    assert len(list(tmp_path.iterdir())) == 4
    for file in tmp_path.glob("*.sha256"):
        subprocess.run(["sha256sum", "--check", "--quiet", file.name], cwd=tmp_path, check=True)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest)["step"] == 100
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncated", "altered", "no checksum"])
def test_a_damaged_newest_one_is_set_aside_and_named(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 5, 10)
    path = tmp_path / "step-00000010.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.with_name(path.name + ".sha256").unlink()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest)["step"] == 5
    assert str(path) in capsys.readouterr().err
    assert path.with_name(path.name + ".damaged").exists()


def test_a_failed_write_leaves_the_last_one_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 5)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path, 10)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest)["step"] == 5


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/tmp/dist_train_ran_code"),))


def test_loading_runs_no_code_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"step": Malicious()}, path)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(path)
    assert not Path("/tmp/dist_train_ran_code").exists()
