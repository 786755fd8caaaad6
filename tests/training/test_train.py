"""Whole runs of the trainer: the same bits on any number of ranks and over interruptions, and bad input."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, TINY, command, environment, lines, needs_ffcv, trainer

Train = Callable[..., dict[str, Any]]


def test_the_same_bits_on_any_number_of_ranks_and_from_either_loader(train: Train, tmp_path: Path) -> None:
    # in bf16: most of the other tests are in fp32
    phases = ["data.smaller=[{size=20, until=0.3}]", "optim.stem.until=0.6"]
    phases += ["precision=bf16", "evaluate.tta=shift"]
    alone = train("1", *phases)
    assert 0 < alone["test_accuracy_tta"] < 1
    for name, ranks, loader in (("2", 2, "stream"), ("3", 3, "resident"), ("8", 8, "resident")):
        other = train(name, *phases, f"loader={loader}", ranks=ranks)
        assert other["world_size"] == ranks
        assert other["weights_sha256"] == alone["weights_sha256"]
        assert lines(tmp_path / name) == lines(tmp_path / "1")
    assert train("seeded", *phases, "seed=1")["weights_sha256"] != alone["weights_sha256"]


@pytest.mark.parametrize("how", ["missing", pytest.param("broken", marks=needs_ffcv)])
def test_without_ffcv_the_same_betons_are_written_and_the_same_bits_trained(
    how: str, train: Train, digits: Path, tmp_path: Path
) -> None:
    alone = train("1")
    hidden, betons = tmp_path / "hidden", tmp_path / "betons"
    (hidden / "ffcv").mkdir(parents=True)
    if how == "missing":
        (hidden / "sitecustomize.py").write_text("import sys\n\nsys.modules['ffcv'] = None\n")
    else:
        (hidden / "ffcv" / "__init__.py").write_text("raise ImportError('libopencv_core.so.4: no such file')\n")
    path = f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    prepared = subprocess.run(
        command("--dataset", "digits", "--out", betons, module="dist_train.data_prep"),
        cwd=REPOSITORY,
        env={**environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert prepared.returncode == 0, prepared.stderr
    assert json.loads((betons / "manifest.json").read_text())["ffcv_version"] is None
    for file in ("train.beton", "test.beton"):
        assert (betons / file).read_bytes() == (digits / file).read_bytes()
    said = [prepared.stderr]
    for ranks, loader in ((1, "resident"), (2, "stream")):
        arguments = ("--preset", "digits", f"data.dir={betons}", *TINY, f"loader={loader}", "--run-dir")
        done = trainer(*arguments, tmp_path / loader, ranks=ranks, variables={"PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
        summary = json.loads((tmp_path / loader / "summary.json").read_text())
        assert summary["weights_sha256"] == alone["weights_sha256"]
        assert lines(tmp_path / loader) == lines(tmp_path / "1")
    sentence = "ffcv is installed but cannot be imported (libopencv_core.so.4: no such file)"
    # once by each command that would use it, on however many ranks; a resident set needs no ffcv
    assert [text.count(sentence) for text in said] == ([1, 0, 1] if how == "broken" else [0, 0, 0])


def test_a_run_folder_holds_what_the_readme_says(train: Train, tmp_path: Path) -> None:
    summary = train("run", "holdout=200", "eval_batch=77")
    folder = tmp_path / "run"
    for name in ("config.toml", "metrics.jsonl", "summary.json", "plots/loss.png", "plots/accuracy.png"):
        assert (folder / name).stat().st_size > 0
    steps = [row for row in lines(folder) if row["kind"] == "step"]
    evals = [row for row in lines(folder) if row["kind"] == "eval"]
    assert [row["step"] for row in steps] == list(range(1, 9))  # (1437 - 200) // 256 steps in each of 2 epochs
    assert [row["epoch"] for row in evals] == [1, 2]
    assert {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "val_loss", "val_accuracy"} <= set(evals[0])
    for row in evals:  # whole images out of 360 and 200
        assert row["test_accuracy"] * 360 == pytest.approx(round(row["test_accuracy"] * 360), abs=1e-9)
        assert row["val_accuracy"] * 200 == pytest.approx(round(row["val_accuracy"] * 200), abs=1e-9)
    assert summary["dataset"] == "digits"
    assert summary["test_accuracy"] == evals[-1]["test_accuracy"]
    assert summary["best_test_accuracy"] == max(row["test_accuracy"] for row in evals)
    for key in (
        "seconds",
        "warm_up_seconds",
        "train_seconds",
        "images_per_second",
        "parameters",
        "flops_per_image",
        "train_flops",
    ):
        assert summary[key] > 0
    assert 0 < summary["mfu"] < 1
    assert summary["versions"]["torch"]
    repeated = trainer("--config", folder / "config.toml", "--run-dir", tmp_path / "repeated")
    assert repeated.returncode == 0, repeated.stderr
    again = json.loads((tmp_path / "repeated" / "summary.json").read_text())
    assert again["weights_sha256"] == summary["weights_sha256"]


def test_fp16_with_a_scaler_trains_and_is_bit_identical(train: Train, tmp_path: Path) -> None:
    narrow = [f"model.{part}.channels=8" for part in ("stem", "blocks.0", "blocks.1")]  # many CPUs have no fp16
    alone = train("1", "precision=fp16", *narrow)
    assert train("2", "precision=fp16", *narrow, ranks=2)["weights_sha256"] == alone["weights_sha256"]
    steps = [row for row in lines(tmp_path / "1") if row["kind"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_compiled_trains_and_is_bit_identical(train: Train, tmp_path: Path) -> None:
    # a maximum of rounded numbers; a pass without gradients that chooses images
    settings = ["precision=bf16", "epochs=1", "model.blocks.1.pool=all", "train.select={fraction=0.5, start=0.5}"]
    alone = train("1", "compile=true", *settings)
    assert train("2", "compile=true", *settings, ranks=2)["weights_sha256"] == alone["weights_sha256"]
    eager = train("eager", *settings)
    assert alone["train_loss"] == pytest.approx(eager["train_loss"], rel=0.02)


FILLING = """
import torch
from dist_train import main
from dist_train.training import train

def filling(*arguments, original=train.train):
    assert not torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(100).isnan().all()
    found = original(*arguments)
    assert torch.utils.deterministic.fill_uninitialized_memory
    return found

train.train = filling
raise SystemExit(main.main())
"""


def test_new_tensors_are_not_filled_and_no_result_depends_on_it(train: Train, tmp_path: Path) -> None:
    summary = train("run", "evaluate.tta=shift", "data.smaller=[{size=20, until=0.3}]")
    rerun = ["--config", tmp_path / "run" / "config.toml", "--run-dir", tmp_path / "filled"]
    done = subprocess.run(
        [sys.executable, "-c", FILLING, *map(str, rerun)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    filled = json.loads((tmp_path / "filled" / "summary.json").read_text())
    assert filled["weights_sha256"] == summary["weights_sha256"]
    assert lines(tmp_path / "filled") == lines(tmp_path / "run")


def test_training_learns(train: Train) -> None:
    summary = train("run", "epochs=6", ranks=2)
    assert summary["test_accuracy"] > 0.8  # chance is 0.1


def refused(*arguments: object, ranks: int = 1, code: int = 2) -> str:
    """The trainer's error for bad input: one line, from rank 0 only."""
    done = trainer(*arguments, ranks=ranks)
    said = [line for line in done.stderr.splitlines() if line.startswith("dist_train: ")]
    assert len(said) == 1, done.stderr
    if ranks == 1:
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    else:
        assert done.returncode != 0
    return said[0]


def test_bad_input_is_answered_in_one_sentence(digits: Path, tmp_path: Path) -> None:
    base = ["--preset", "digits", f"data.dir={digits}", *TINY, "--run-dir", tmp_path / "run"]
    assert "there is no such setting" in refused(*base, "epohcs=3")
    assert "block 1, convolution 2" in refused(*base, "model.blocks.0.convolutions=[{}, {padding=0}]")
    assert "does not split into train.microbatches = 8" in refused(*base, "batch_size=250")
    assert "holds digits, but data.dataset = cifar10" in refused(*base, "data.dataset=cifar10")
    assert "data.smaller: size = 33 is larger" in refused(*base, "data.smaller=[{size=33, until=1}]")
    assert "torch finds no GPU" in refused(*base, "device=cuda") or shutil.which("nvidia-smi")
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in refused(*base, "--run-dir", file / "run")
    assert not (tmp_path / "run").exists()  # all of it was refused before any work


def test_more_ranks_than_microbatches_are_refused(digits: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", "microbatches=2", "--run-dir", tmp_path / "run"]
    assert "train.microbatches = 2 gives work to at most 2 ranks, but 3 were started" in refused(*arguments, ranks=3)


def test_a_partly_set_environment_is_named(digits: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command("--preset", "digits", f"data.dir={digits}", "--run-dir", tmp_path / "run"),
        cwd=REPOSITORY,
        env={**environment(), "RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "RANK, WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "classes"])
def test_damaged_betons_are_refused(digits: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "betons"
    shutil.copytree(digits, folder)
    beton = folder / "train.beton"
    content = bytearray(beton.read_bytes())
    if damage == "truncated":
        beton.write_bytes(content[:-1000])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        beton.write_bytes(content)
    elif damage == "missing":
        beton.unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["classes"] = manifest["classes"][:9]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    said = refused("--preset", "digits", f"data.dir={folder}", *TINY, "--run-dir", tmp_path / "run")
    assert "train.beton" in said or "manifest.json" in said or "9 classes" in said


def test_a_run_folder_of_another_configuration_is_refused(digits: Path, train: Train, tmp_path: Path) -> None:
    summary = train("run")
    said = refused("--preset", "digits", f"data.dir={digits}", *TINY, "seed=7", "--run-dir", tmp_path / "run")
    assert "belongs to a run with another train.seed" in said
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    text = (other / "manifest.json").read_text()
    content = json.loads(text)["splits"]["train"]["content_sha256"]
    (other / "manifest.json").write_text(text.replace(content, "0" * 64))
    said = refused("--preset", "digits", f"data.dir={other}", *TINY, "--run-dir", tmp_path / "run")
    assert "belongs to a run on other images of digits" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_what_is_not_finite_stops_the_run_with_its_step_and_images(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    base = ["--preset", "digits", f"data.dir={digits}", *TINY, "--run-dir", folder]
    hot = ["optim.default.algorithm=sgd", "optim.default.lr=1e30", "optim.warmup=0.0"]
    said = refused(*base, *hot, code=1)
    assert "the loss is " in said
    step = int(said.split(" at step ")[1].split()[0])
    assert not list(folder.glob("checkpoints/step-*.pt"))
    assert [row["step"] for row in lines(folder) if row["kind"] == "step"] == list(range(1, step))
    found = json.loads((folder / "diverged.json").read_text())
    assert found["step"] == step
    for microbatch in found["microbatches"]:
        assert not math.isfinite(float(microbatch["largest_gradient"]))
        assert len(set(microbatch["images"])) == 256 // 8
    assert f"microbatch {found['microbatches'][0]['microbatch']} " in said
    assert f"training images {found['microbatches'][0]['images'][0]}, " in said
    assert refused(*base, *hot, code=1) == said


def test_weights_that_are_not_finite_are_not_saved(digits: Path, tmp_path: Path) -> None:
    """The warm-up leaves the first step without effect; the update of the second breaks the network."""
    folder = tmp_path / "run"
    base = ["--preset", "digits", f"data.dir={digits}", *TINY, "every_steps=1", "--run-dir", folder]
    hot = ["optim.default.algorithm=sgd", "optim.default.lr=1e38", "optim.warmup=0.5"]
    said = refused(*base, *hot, code=1)
    assert "after step 2 " in said
    assert "tensors are not finite" in said
    assert "as they were after step 1" in said
    assert [path.name for path in folder.glob("checkpoints/step-*.pt")] == ["step-00000001.pt"]
    assert not [row for row in lines(folder) if row["kind"] == "eval"]
    assert json.loads((folder / "diverged.json").read_text()) == {"step": 2, "microbatches": []}
    assert refused(*base, *hot, code=1) == said  # the same command resumes from the last good checkpoint


def test_few_steps_give_the_accuracy_of_training(digits: Path, tmp_path: Path) -> None:
    """Six steps in all: running averages of the BatchNorm statistics would still be near their initial values."""
    done = trainer(
        *("--preset", "digits", f"data.dir={digits}", *TINY, "batch_size=1400", "epochs=6", "optim.warmup=0.0"),
        *("--run-dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["test_accuracy"] > summary["train_accuracy"] - 0.05
    assert summary["test_accuracy"] > 0.45
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["batch_size=8", "epochs=0.5"], "raise train.batch_size, or lower train.microbatches"),
        (
            ["batch_size=16", "epochs=1", "train.select.fraction=0.5"],
            "raise train.select.fraction, raise train.batch_size, or lower train.microbatches",
        ),
    ],
)
def test_microbatches_that_are_too_small_are_reported(
    settings: list[str], remedy: str, digits: Path, tmp_path: Path
) -> None:
    done = trainer("--preset", "digits", f"data.dir={digits}", *TINY, *settings, "--run-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"dist_train: of the same [\d,]+ training images \d+\.\d % are classified correctly with the BatchNorm "
        r"statistics of each microbatch, as in training, and \d+\.\d % in evaluation; microbatches, of which 1 image "
        rf"is trained on, are too small for this network: {remedy}\n",
        done.stderr,
    )
