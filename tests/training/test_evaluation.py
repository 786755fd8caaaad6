"""Evaluation against its definition, in numpy."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, lines, trainer
from PIL import Image
from torch import Tensor, nn

from dist_train import config, data_prep, load
from dist_train.config.settings import DataConfig, TrainConfig, Tta
from dist_train.data.batches import Data
from dist_train.data.dataset import manifest
from dist_train.distributed.ranks import Ranks
from dist_train.errors import NotFiniteError
from dist_train.model.network import BlockNetwork
from dist_train.training.evaluation import evaluate

OFF = torch.autocast("cpu", enabled=False)
ALONE = Ranks(0, 1, torch.device("cpu"), torch.device("cpu"))


def loaded(digits: Path, **settings: object) -> Data:
    config = DataConfig(dataset="digits", dir=str(digits), holdout=50, eval_batch=77, **settings)  # type: ignore[arg-type]
    return Data(config, TrainConfig(batch_size=256, microbatches=4), manifest(config), ALONE)


def scores(network: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Logits as the option's words say, view by view."""

    def mirrored(x: Tensor) -> Tensor:
        half: Tensor = 0.5 * network(x) + 0.5 * network(x.flip(3))
        return half

    if tta == "none":
        plain: Tensor = network(images)
        return plain
    if tta == "mirror":
        return mirrored(images)
    height, width = images.shape[2:]
    up_left, down_right = torch.empty_like(images), torch.empty_like(images)
    for row in range(height):
        for column in range(width):
            # pixels of the neighbour; beyond the border those on the other side of it
            up_left[:, :, row, column] = images[:, :, abs(row - 1), abs(column - 1)]
            below, right = (n - 1 - abs(n - 2 - i) for n, i in ((height, row), (width, column)))
            down_right[:, :, row, column] = images[:, :, below, right]
    return 0.5 * mirrored(images) + 0.25 * mirrored(up_left) + 0.25 * mirrored(down_right)


@pytest.mark.parametrize("tta", ["none", "mirror", "shift"])
def test_metrics_with_and_without_test_time_augmentation(digits: Path, tta: Tta) -> None:
    data = loaded(digits)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    assert data.evaluated() == [("test", "test"), ("val", "holdout")]
    for _, split in data.evaluated():
        found = evaluate(network, data, split, ALONE, OFF, tta)
        assert network.training
        batches = list(data.evaluation(split))
        labels = torch.cat([labels for _, _, labels in batches])
        assert found.labels.tolist() == labels.tolist()
        for suffix in {"", "_tta" if tta != "none" else ""}:
            logits = torch.cat(
                [scores(network, images, tta if suffix else "none").detach() for _, images, _ in batches]
            )
            assert found.metrics[f"accuracy{suffix}"] == float(np.mean((logits.argmax(1) == labels).numpy()))
            assert found.metrics[f"loss{suffix}"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert len(found.metrics) == (2 if tta == "none" else 4)


@pytest.mark.parametrize("tta", ["none", "mirror"])
def test_logits_that_are_not_finite_give_no_metrics(digits: Path, tta: Tta) -> None:
    data = loaded(digits)
    images = torch.cat([images for _, images, _ in data.evaluation("test")])
    brightest = images.sum((1, 2, 3)).topk(2).indices
    limit = images.sum((1, 2, 3))[brightest].min()

    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            over = torch.where(x.sum((1, 2, 3)) > limit - 1e-2, float("inf"), 0.0)
            return torch.stack((over, -over), 1).repeat(1, 5)

    with pytest.raises(NotFiniteError, match=r"the logits of \d of 360 images of the split test are not finite"):
        evaluate(Overflowing(), data, "test", ALONE, OFF, tta)


def test_details_are_those_of_each_image(digits: Path) -> None:
    """Confusion, calibration, coefficients and wrong answers, from one forward pass of each image alone."""
    data = loaded(digits)
    settings = config.load("digits", None, [])
    torch.manual_seed(1)
    network = BlockNetwork(settings.model, (3, 32, 32), 10)
    for block in network.blocks:
        nn.init.normal_(block.mixing.fc.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    nn.init.normal_(network.output.logits.weight, std=2.0)
    found = evaluate(network, data, "test", ALONE, OFF, "mirror").details(data, 7)
    images, labels = data_prep.read_split(digits, "test")
    (all_images,) = [torch.cat([images for _, images, _ in data.evaluation("test")])]
    network.eval()
    seen: list[list[Tensor]] = [[], []]
    for kept, block in zip(seen, network.blocks, strict=True):
        block.mixing.register_forward_hook(lambda _, __, a, kept=kept: kept.append(a))  # type: ignore[union-attr]
    with torch.no_grad():
        probabilities = network(all_images).softmax(1).numpy()
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)

    assert (found["split"], found["step"], found["images"], len(found["classes"])) == ("test", 7, 360, 10)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, predicted), 1)
    assert found["confusion"] == confusion.tolist()
    assert found["accuracy"] == confusion.trace() / 360
    error = 0.0
    for number, b in enumerate(found["calibration"]["bins"]):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        assert b["count"] == inside.sum()
        if b["count"]:
            assert b["confidence"] == pytest.approx(confidence[inside].mean(), rel=1e-5)
            assert b["accuracy"] == pytest.approx((labels == predicted)[inside].mean())
            error += abs(b["confidence"] - b["accuracy"]) * b["count"] / 360
    assert found["calibration"]["ece"] == pytest.approx(error, rel=1e-6)
    for block, (a,) in zip(found["coefficients"], seen, strict=True):
        np.testing.assert_allclose(block["mean"], a.mean(0), atol=1e-5)
        np.testing.assert_allclose(block["std"], a.std(0, correction=0), atol=1e-4)
        np.testing.assert_allclose(block["by_class"], [a[labels == c].mean(0) for c in range(10)], atol=1e-5)
    assert [block["branches"] for block in found["coefficients"]] == [["3x3", "1x1"], ["3x3", "3x3 d2", "1x1"]]
    wrong = found["wrong"]
    assert len(wrong) == 40
    assert [w["confidence"] for w in wrong] == sorted((w["confidence"] for w in wrong), reverse=True)
    assert wrong[0]["confidence"] == pytest.approx(confidence[predicted != labels].max(), rel=1e-6)
    for w in wrong:
        assert (w["label"], w["predicted"]) == (labels[w["index"]], predicted[w["index"]])
        png = Image.open(io.BytesIO(base64.b64decode(w["png"])))
        np.testing.assert_array_equal(np.asarray(png), images[w["index"]])
    json.dumps(found, allow_nan=False)


def test_the_command_gives_the_metrics_of_the_run(digits: Path, tmp_path: Path) -> None:
    """From the checkpoint alone, on one rank and on three, byte for byte."""
    run = tmp_path / "run"
    settings = [*TINY, "evaluate.tta=shift", "holdout=100", "train.device=cpu"]
    done = trainer("--preset", "digits", f"data.dir={digits}", *settings, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    own = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    checkpoint = max((run / "checkpoints").glob("*.pt"))
    for ranks in (1, 3):
        found = evaluation(checkpoint, "--json", ranks=ranks)
        assert json.loads(found.stdout) == json.loads(own)
    told = evaluation(run, "--write").stdout
    assert (run / "evaluation.json").read_bytes() == own
    details = json.loads(own)
    assert f"\naccuracy {100 * details['accuracy']:.2f} % (95 %: " in told
    for number, name in enumerate(details["classes"]):
        row = details["confusion"][number]
        assert re.search(rf"^{name} +{sum(row)} +{100 * row[number] / sum(row):.2f} %", told, re.MULTILINE)
    last = lines(run)[-1]
    assert (last["test_accuracy"], last["test_loss_tta"]) == (details["accuracy"], details["loss_tta"])
    held_out = json.loads(evaluation(run, "--split", "holdout", "--json").stdout)
    assert (held_out["accuracy"], held_out["loss"], held_out["images"]) == (last["val_accuracy"], last["val_loss"], 100)
    (run / "evaluation.json").unlink()
    (run / "evaluation.json").mkdir()
    unwritten = evaluation(run, "--write")
    assert (unwritten.returncode, unwritten.stdout) == (2, told)
    assert unwritten.stderr.splitlines() == [
        f"dist_train: {run / 'evaluation.json'}: cannot be used (Is a directory); name another"
    ]
    elsewhere = evaluation(run, f"--data={tmp_path}")
    assert (elsewhere.returncode, elsewhere.stdout) == (2, "")
    assert re.fullmatch(r"dist_train: .* has classes that the network does not have, run: .*\n", elsewhere.stderr)
    other_data(digits, run, tmp_path / "photos")
    missing = evaluation(tmp_path / "none")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)


def other_data(digits: Path, run: Path, folder: Path) -> None:
    """A second labelled set: pictures of some classes, in betons of another order of classes, and on two ranks."""
    images, labels = data_prep.read_split(digits, "test")
    for number in (*range(60), 359):
        place = folder / "test" / f"digit {labels[number]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).resize((64, 64), Image.Resampling.NEAREST).save(place / f"{number}.png")
    (folder / "test" / "notes.txt").touch()
    found = evaluation(run, "--data", folder / "test", "--json", ranks=2)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("skipped 1, since their names are not those of images: notes.txt") == 1
    details = json.loads(found.stdout)
    assert (details["dataset"], details["split"], details["images"]) == ("photos/test", "test", 61)
    chosen = [*range(60), 359]
    assert np.sum(details["confusion"], 1).tolist() == np.bincount(labels[chosen], minlength=10).tolist()
    paths = sorted((folder / "test").rglob("*.png"))
    answers = [answer[0][0] for answer in load(run, "cpu").predict([*paths], top=1)]
    right = sum(answer == path.parent.name for answer, path in zip(answers, paths, strict=True))
    assert details["accuracy"] == pytest.approx(right / 61)

    for place in [*(folder / "test").glob("digit*")][:-2]:
        shutil.rmtree(place)
    shutil.copytree(folder / "test", folder / "train")
    data_prep.prepare("again", folder / "betons", folder, image_size=32)
    details = json.loads(evaluation(run, "--data", folder / "betons", "--json").stdout)
    assert details["dataset"] == "again"
    assert [name for name, row in zip(details["classes"], details["confusion"], strict=True) if sum(row)] == [
        *data_prep.check(folder / "betons").classes
    ]
    for more, words in (
        (["--write"], "--write: .* is not the data set of .*; remove --write, or --data"),
        (["--split", "holdout"], "--split holdout: .* is not the data set of"),
        (["--data", folder / "none"], "--data .*none: there is no such folder"),
    ):
        refused = evaluation(run, "--data", folder / "betons", *more)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert re.fullmatch(f"dist_train: {words}.*\n", refused.stderr)


def evaluation(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return trainer(*arguments, "--device", "cpu", ranks=ranks, module="dist_train evaluate")
