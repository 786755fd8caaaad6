"""Networks that cannot be trained, because of their batches or of the memory here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, command, environment, trainer

from dist_train import config
from dist_train.errors import UserError
from dist_train.model.shapes import check_training
from dist_train.reports.architecture import totals

IMAGES, CLASSES, TEST = (3, 32, 32), 10, 360
ONE_PIXEL = ["batch_size=8", "model.blocks.1.pool=all"]  # in microbatches of one image


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([*ONE_PIXEL, "model.blocks.1.pool_at=sum"], r"block 2: its BatchNorm .* raise"),
        ([*ONE_PIXEL, "model.blocks.0.pool=16", "model.blocks.1.norm=branch"], r"block 2: its BatchNorm .* raise"),
        (
            ["train.select.fraction=0.05", "model.blocks.1.pool=all", "model.blocks.1.pool_at=sum"],
            r"block 2: its BatchNorm .* in train\.microbatches = 8, of which train\.select\.fraction = 0\.05 is kept\)",
        ),
        (["model.output.hidden=[65536,65536]"], r"its weights and their gradients take 34 GB, .* has 9 GB"),
        (
            ["model.blocks.0.convolutions=[{kernel=1, padding=9000}]"],
            r"train\.batch_size = 128 in .* 16 images takes at",
        ),
        (
            ["batch_size=8", "model.blocks.0.convolutions=[{kernel=1, padding=800}]"],
            r"data\.eval_batch = 500: 360 images",
        ),
    ],
)
def test_networks_that_cannot_be_trained_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_training(config.load("digits", None, settings), IMAGES, CLASSES, TEST, 9e9, 9e9)


@pytest.mark.parametrize(
    "settings", [ONE_PIXEL, ["batch_size=8", "model.blocks.1.norm=none", "model.blocks.1.pool=all"]]
)
def test_one_image_is_enough_where_a_batch_norm_sees_several_pixels(settings: list[str]) -> None:
    check_training(config.load("digits", None, settings), IMAGES, CLASSES, TEST, 9e9, 9e9)


@pytest.mark.parametrize("preset", config.presets())
def test_only_what_a_network_takes_at_the_least_is_counted(preset: str) -> None:
    settings = config.load(preset, None, [])
    weights = totals(settings.model, IMAGES, CLASSES)["bytes"]  # a little more, with biases and norms
    check_training(settings, IMAGES, CLASSES, TEST, 2 * weights, 9e9)
    with pytest.raises(UserError, match="its weights and their gradients"):
        check_training(settings, IMAGES, CLASSES, TEST, 1.9 * weights, 9e9)


def test_the_trainer_refuses_what_cannot_be_trained(digits: Path, tmp_path: Path) -> None:
    settings = ["--preset", "digits", f"data.dir={digits}", *ONE_PIXEL, "model.blocks.1.pool_at=sum"]
    done = trainer(*settings, "--run-dir", tmp_path / "run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "block 2: its BatchNorm would have one value" in done.stderr
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_is_said_in_one_sentence(digits: Path, tmp_path: Path) -> None:
    settings = [
        "--preset",
        "digits",
        f"data.dir={digits}",
        "precision=fp32",
        "record.wandb=disabled",
        "batch_size=1024",
    ]
    settings += ["microbatches=1", "model.stem.channels=1000", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 6000000; exec "$@"', "bash", *command(*settings)],
        env={**environment(), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "dist_train: rank 0 ran out of memory (" in done.stderr
