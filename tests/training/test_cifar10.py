"""The main job on the real CIFAR-10, in short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import trainer

# the shape of block94 at an eighth of the width
NARROW = [f"model.blocks.{block}.channels={width}" for block, width in enumerate((16, 16, 32, 32, 32, 32))]


def test_prepare_train_on_two_ranks_resume_and_evaluate(cifar10: Path, tmp_path: Path) -> None:
    base = ["--preset", "block94", f"data.dir={cifar10}", *NARROW, "batch_size=1000", "model.output.init_std=0.03"]
    base += ["epochs=0.6", "precision=fp32", "data.smaller=[{size=24, until=0.5}]", "every_steps=20"]
    base += ["evaluate.tta=mirror", "record.wandb=disabled"]
    done = trainer(*base, "--run-dir", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "cifar10: 50,000 training and 10,000 test images; 2 ranks" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # chance is 0.1, a linear classifier reaches 0.4; a random block network with a trained output layer less
    assert summary["test_accuracy"] > 0.5
    for row in (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        if row["kind"] == "eval":
            counted = row["test_accuracy"] * 10_000  # of whole images
            assert counted == pytest.approx(round(counted), abs=1e-6)

    # the same run from the checkpoint before the last on, as after a kill, on one rank
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000030*"):
        path.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    again = trainer(*base, "--run-dir", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "resuming after step 20" in again.stdout
    resumed = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert resumed["weights_sha256"] == summary["weights_sha256"]
    assert resumed["test_accuracy"] == summary["test_accuracy"]
