"""A folder of one's own images: written into betons, then trained on, as a user does it."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, environment
from PIL import Image, ImageDraw
from test_data_prep import edit_manifest, refused, run_here, snapshot

from dist_train import config, data_prep
from dist_train.config import loading
from dist_train.config.settings import Block, Convolution, DataConfig
from dist_train.data.batches import Data
from dist_train.data.dataset import manifest, prepare
from dist_train.distributed.ranks import Ranks
from dist_train.errors import UserError
from dist_train.runs.metrics import read_metrics

EXAMPLES = REPOSITORY / "dist_train" / "examples"
COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "orange", "purple")
CPU = torch.device("cpu")
QUIET = ("record.wandb=disabled", "train.device=cpu")


def draw(folder: Path, classes: int, count: int, width: int = 40, height: int = 30) -> Path:
    """`count` pictures of each class: a shape of the class's colour and size somewhere on grey."""
    places = random.Random(0)
    for label in range(classes):
        (folder / f"class{label:02}").mkdir(parents=True)
        for number in range(count):
            picture = Image.new("RGB", (width, height), (places.randrange(60, 120),) * 3)
            x, y, side = (
                places.randrange(2, width // 2),
                places.randrange(2, height // 2),
                4 + label // len(COLOURS) * 3,
            )
            ImageDraw.Draw(picture).rectangle((x, y, x + side, y + side), COLOURS[label % len(COLOURS)])
            picture.save(folder / f"class{label:02}" / f"{number:03}.png")
    return folder


def write(out: Path, source: Path, size: int, *more: object) -> subprocess.CompletedProcess[str]:
    return run_here("--dataset", "shapes", "--source", source, "--image-size", size, "--out", out, *more)


def written(out: Path, source: Path, size: int, *more: object) -> dict[str, tuple[np.ndarray[Any, Any], list[int]]]:
    result = write(out, source, size, *more)
    assert result.returncode == 0, result.stderr
    read = {split: data_prep.read_split(out, split) for split in ("train", "test")}
    return {split: (images, labels.tolist()) for split, (images, labels) in read.items()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("source") / "shapes", classes=3, count=10)


@pytest.fixture(scope="module")
def betons(shapes: Path) -> Path:
    out = shapes.parent / "betons"
    result = write(out, shapes, 20)
    assert result.returncode == 0, result.stderr
    assert "shapes, 24 train and 6 test images of 20x20x3, ready" in result.stdout
    assert "3 classes: class00, class01, class02" in result.stderr
    return out


def test_constant_channels_have_a_deviation_to_divide_by(tmp_path: Path) -> None:
    """No blue at all, and a red that varies by less than one of 256 levels."""
    for label in range(2):
        (tmp_path / "source" / f"class{label}").mkdir(parents=True)
        for number in range(5):
            colour = (7 + (label == number == 0), 40 * number + 20 * label, 0)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "source" / f"class{label}" / f"{number}.png")
    out = tmp_path / "betons"
    written(out, tmp_path / "source", 8)
    read = data_prep.check(out)
    assert read.std[0] == read.std[2] == 1.0
    assert 0.1 < read.std[1] < 0.5
    edit_manifest(out, lambda content: content.update(std=[0.0, 0.2, 1.0]))
    with pytest.raises(data_prep.DataError):
        data_prep.check(out)


# --- from files to pixels -----------------------------------------------------------------------------------


def test_images_of_every_kind_become_rgb_squares(tmp_path: Path) -> None:
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("lime", (30, 0, 60, 30))  # all that is left of it
    halves = Image.new("RGB", (40, 40), "red")
    halves.paste("blue", (20, 0, 40, 40))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise: the left half is then the upper one
    clear = Image.new("RGBA", (20, 20), (0, 255, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 10, 20, 20))
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    deep = Image.fromarray(np.full((20, 20), 0x8040, np.uint16))
    fine = Image.fromarray((np.indices((40, 40)).sum(0) % 2 * 255).astype(np.uint8))  # antialiased it is grey
    red, lime, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    kinds: dict[str, tuple[Image.Image, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
        # with the upper left and the lower left pixel expected
        "wide.png": (wide, lime, lime, {}),
        "tall.PNG": (wide.rotate(90, expand=True), lime, lime, {}),
        "turned.jpg": (halves, red, blue, {"exif": turned}),
        "clear.webp": (clear, white, red, {"lossless": True}),
        "palette.bmp": (palette, blue, blue, {}),
        "palette.png": (palette, white, white, {"transparency": 1}),
        "deep.png": (deep, (128,) * 3, (128,) * 3, {}),
        "deep.tif": (deep, (128,) * 3, (128,) * 3, {}),
        "grey.jpeg": (Image.new("L", (9, 21), 77), (77,) * 3, (77,) * 3, {}),
        "both.png": (Image.new("LA", (20, 20), (50, 255)), (50,) * 3, (50,) * 3, {}),
        "ink.tiff": (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), red, red, {}),
        "bits.png": (Image.new("1", (20, 20), 1), white, white, {}),
        "fine.png": (fine, (127,) * 3, (127,) * 3, {}),
        "dot.ppm": (Image.new("RGB", (1, 1), "blue"), blue, blue, {}),
        "large.jpg": (Image.new("RGB", (1600, 1200), "blue"), blue, blue, {}),
    }
    for name, (image, _, _, options) in kinds.items():  # each in a class of its own: its label tells which it is
        (tmp_path / "in" / name).mkdir(parents=True)
        for twin in ("one", "two"):
            image.save(tmp_path / "in" / name / f"{twin}{Path(name).suffix}", **options)
    splits = written(tmp_path / "out", tmp_path / "in", 16)
    classes = data_prep.check(tmp_path / "out").classes
    assert list(classes) == sorted(kinds)
    for images, labels in splits.values():
        assert images.shape == (len(kinds), 16, 16, 3)
        assert images.dtype == np.uint8
        for image, label in zip(images.astype(int), labels, strict=True):
            _, upper, lower, _ = kinds[classes[label]]
            assert abs(image[1, 1] - upper).max() <= 3, classes[label]
            assert abs(image[-2, 1] - lower).max() <= 3, classes[label]


def test_an_image_larger_than_the_smallest_page_is_written_too(tmp_path: Path) -> None:
    draw(tmp_path / "in", classes=2, count=2, width=30, height=30)
    splits = written(tmp_path / "out", tmp_path / "in", 840)
    assert splits["train"][0].shape == (2, 840, 840, 3)


# --- from folders to splits ---------------------------------------------------------------------------------


def test_a_share_of_each_class_is_for_testing_and_the_same_folder_gives_the_same_bytes(
    shapes: Path, betons: Path, tmp_path: Path
) -> None:
    for split, each in (("train", 8), ("test", 2)):
        images, labels = data_prep.read_split(betons, split)
        assert np.bincount(labels).tolist() == [each] * 3
        assert labels.tolist() != sorted(labels)  # mixed, so that a part of the set has all classes
        assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 3 * each
    moved = tmp_path / "elsewhere"
    for path in sorted(shapes.rglob("*.png"), reverse=True):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.parent.name)
    written(tmp_path / "again", moved, 20)
    found = data_prep.check(tmp_path / "again")
    assert found == dataclasses.replace(data_prep.check(betons), source=str(moved))
    tenth = written(tmp_path / "tenth", shapes, 20, "--test-fraction", 0.1)
    assert (len(tenth["train"][1]), len(tenth["test"][1])) == (27, 3)
    # the tenth's test images are among those of the fifth
    fifth = {image.tobytes() for image in data_prep.read_split(betons, "test")[0]}
    assert {image.tobytes() for image in tenth["test"][0]} < fifth


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_part_of_the_folder_is_kept_and_other_files_are_skipped(shapes: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "in"
    shutil.copytree(shapes, source / "train")
    shutil.copytree(shapes / "class01", source / name / "class01" / "below")
    (source / "train" / "class00" / "notes.txt").write_text("no image")
    (source / "train" / "class00" / "._000.png").write_text("nor this")
    (source / "train" / ".cache").mkdir()
    result = write(tmp_path / "out", source, 20)
    assert "shapes, 30 train and 10 test images" in result.stdout, result.stderr
    assert "skipped, since their names are not those of images: train/class00/notes.txt\n" in result.stderr
    assert set(data_prep.read_split(tmp_path / "out", "test")[1].tolist()) == {1}


def without_images(source: Path) -> None:
    (source / "empty").mkdir()


def with_one_image(source: Path) -> None:
    (source / "single").mkdir()
    shutil.copy(source / "class00" / "000.png", source / "single")


def with_one_class(source: Path) -> None:
    for name in ("class01", "class02"):
        shutil.rmtree(source / name)


def with_an_unknown_test_class(source: Path) -> None:
    for name in ("train", "test"):
        (source / name).mkdir()
        for path in source.glob("class*"):
            shutil.copytree(path, source / name / path.name)
    (source / "train" / "class02").rename(source / "train" / "other")


def with_an_empty_test_part(source: Path) -> None:
    with_an_unknown_test_class(source)
    shutil.rmtree(source / "test")
    (source / "test").mkdir()
    shutil.copy(source / "class00" / "000.png", source / "test")


def with_broken_files(source: Path) -> None:
    whole = (source / "class00" / "000.png").read_bytes()
    (source / "class00" / "000.png").write_bytes(whole[:-40])
    (source / "class01" / "no.jpg").write_text("no picture")
    (source / "class01" / "no.png").write_bytes(b"")
    (source / "class02" / "gone.png").symlink_to(source / "nowhere.png")
    for number in range(3):
        Image.fromarray(np.ones((5, 5), np.float32)).save(source / "class02" / f"real{number}.tif")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["is not a folder"]),
        (without_images, ["has no images for empty", "or remove the folder"]),
        (with_one_image, ["has a single image for single"]),
        (with_one_class, ["holds one class, class00", "at least two"]),
        (with_an_unknown_test_class, ["test has classes that", "class02"]),
        (with_an_empty_test_part, ["test has no folders of classes"]),
        (with_broken_files, ["7 of the 36 images", "no.jpg (not an image)", " and 4 more", "remove or replace"]),
    ],
)
def test_an_invalid_folder_is_reported_in_one_sentence(
    shapes: Path, tmp_path: Path, damage: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(shapes, tmp_path / "in"))
    damage(source)
    with pytest.raises(data_prep.DataError) as caught:
        data_prep.prepare("shapes", tmp_path / "out", source, image_size=20)
    assert "\n" not in str(caught.value)
    for word in (str(source), *words):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_or_invalid_arguments_are_refused(shapes: Path, betons: Path, tmp_path: Path, digits: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(run_here("--dataset", "shapes", *out), "'shapes' is unknown: choose one of cifar10, digits", "--source")
    refused(run_here("--dataset", "shapes", "--source", shapes, *out), "--image-size is missing")
    refused(write(tmp_path / "out", shapes, -1), "--image-size -1")
    refused(write(tmp_path / "out", shapes, 26_755), "--image-size 26755", "give at most 26754")
    refused(write(tmp_path / "out", shapes, 20, "--test-fraction", 1), "--test-fraction 1.0", "between 0 and 1")
    refused(run_here("--image-size", 20, *out), "--image-size 20 is for images of your own, not for cifar10")
    before = snapshot(betons)
    assert run_here("--dataset", "shapes", "--out", betons).returncode == 0  # the source is not needed any more
    command = f"python -m dist_train.data_prep --dataset shapes --source {shapes} --image-size 30 --out {betons}"
    refused(
        write(betons, shapes, 30), "holds images of 20x20 pixels, not 30x30", f"delete the folder {betons}", command
    )
    refused(write(betons, shapes, 20, "--test-fraction", 0.5), "written with --test-fraction 0.2, not 0.5")
    refused(run_here("--dataset", "others", "--out", betons), "holds the data set shapes, not others")
    refused(write(betons, tmp_path, 20), f"holds the images of {shapes}, not of {tmp_path}")
    assert snapshot(betons) == before
    older = Path(shutil.copytree(digits, tmp_path / "digits"))
    edit_manifest(older, lambda raw: (raw.pop("source"), raw.pop("test_fraction")))  # as written before there were any
    assert data_prep.check(older) == data_prep.check(digits)


# --- training -----------------------------------------------------------------------------------------------


def start(module: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *module.split(), *map(str, arguments)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_the_trainer_says_what_to_do_about_its_data(shapes: Path, betons: Path, tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    with pytest.raises(UserError, match=r"data\.dataset = shapes: there is no such data set; .* set data\.source to"):
        prepare(DataConfig("shapes", str(out)))
    with pytest.raises(UserError, match=r"data\.image_size = 0: the images of shapes need a size"):
        manifest(DataConfig("shapes", str(out), source=str(shapes)))
    with pytest.raises(UserError, match=r"data\.image_size = 20: digits has images of a fixed size"):
        prepare(DataConfig("digits", str(out), image_size=20))
    with pytest.raises(UserError, match=r"there is no data set; write it with python -m dist_train.data_prep") as said:
        manifest(DataConfig("shapes", str(out), source=str(shapes), image_size=24))
    words = shlex.split(str(said.value).partition(" with ")[2])
    assert run_here(*words[3:]).returncode == 0
    right = DataConfig("shapes", str(out), image_size=24)
    assert manifest(right) == manifest(DataConfig("shapes", str(out)))
    with pytest.raises(UserError, match=rf"holds the images of {shapes}, but data\.source = {tmp_path}; give these"):
        manifest(DataConfig("shapes", str(out), source=str(tmp_path)))
    prepare(right)  # nothing to do, and no source needed for that
    with pytest.raises(
        UserError, match=r"holds images of 24x24 pixels, but data\.image_size = 30; set data\.dir="
    ) as said:
        manifest(DataConfig("shapes", str(out), source=str(shapes), image_size=30))
    words = shlex.split(str(said.value).partition(" write that with ")[2])
    assert run_here(*words[3:]).returncode == 0
    assert manifest(DataConfig("shapes", words[-1], image_size=30)).image_shape == (30, 30, 3)


def test_where_images_come_from_binds_no_run_but_their_size_does() -> None:
    loaded = [
        config.load(None, EXAMPLES / "image_folder.toml", [setting])
        for setting in ("data.source=a", "data.source=b", "image_size=32")
    ]
    assert config.difference(loaded[0], loaded[1]) == []
    assert config.difference(loaded[0], loaded[2]) == ["data.image_size"]


def test_the_quick_start_trains_on_a_folder_of_images(tmp_path: Path) -> None:
    source = draw(tmp_path / "in", classes=4, count=40)
    example = ("--config", EXAMPLES / "image_folder.toml", f"data.source={source}", "epochs=2")
    done = start("dist_train quickstart", *example, *QUIET, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mine: 128 training and 32 test images" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert summary(run)["steps"] == 2
    assert data_prep.check(tmp_path / "data" / "mine").image_shape == (64, 64, 3)


def test_many_classes_and_small_images_give_the_same_weights_from_both_loaders(tmp_path: Path) -> None:
    source = draw(tmp_path / "in", classes=37, count=5)
    own = ("data.dataset=shapes", f"data.source={source}", "image_size=20", "translate=3", "cutout=5", "holdout=20")
    smaller = "data.smaller=[{size = 10, until_epoch = 0.5}, {size = 13, until_epoch = 1, how = 'scale'}]"
    narrow = [f"model.blocks.{number}.channels={width}" for number, width in enumerate((8, 8, 16, 16, 16, 16))]
    short = ("epochs=2", "batch_size=64", "model.output.init_std=0.1", *QUIET, *narrow, smaller)
    found = []
    for module, loader in (("dist_train.launch.node", "resident"), ("dist_train.main", "stream")):
        run = tmp_path / loader
        done = start(module, *own, *short, f"loader={loader}", "--run-dir", run, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(summary(run))
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    assert found[0]["test_accuracy_tta"] == found[1]["test_accuracy_tta"]
    assert found[0]["steps"] == 4


def test_few_classes_and_large_images_give_the_same_microbatches_from_both_loaders(
    shapes: Path, tmp_path: Path
) -> None:
    assert write(tmp_path / "out", shapes, 96).returncode == 0
    batches: list[list[tuple[torch.Tensor, ...]]] = []
    for loader in ("resident", "stream"):
        settings = DataConfig("shapes", str(tmp_path / "out"), image_size=96, loader=loader, translate=9, cutout=20)
        data = Data(settings, manifest(settings), Ranks(0, 1, CPU, CPU), batch_size=8, microbatches=4, seed=0)
        steps = data.steps(1)
        batches.append([(m.images.clone(), m.labels.clone(), m.indices) for _ in range(3) for m in next(steps)])
        batches[-1] += [(images.clone(), labels.clone()) for _, images, labels in data.evaluation("test")]
    for mine, theirs in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert batches[0][0][0].shape == (2, 3, 96, 96)


def test_the_example_of_an_own_architecture_shows_every_setting_of_blocks_and_trains(
    digits: Path, tmp_path: Path
) -> None:
    path = EXAMPLES / "own_architecture.toml"
    blocks = loading._read(path)["model"]["blocks"]
    assert {key for block in blocks for key in block} == {field.name for field in dataclasses.fields(Block)}
    shown = {key for block in blocks for convolution in block["convolutions"] for key in convolution}
    assert shown == {field.name for field in dataclasses.fields(Convolution)}
    settings = ("data.dataset=digits", f"data.dir={digits}", "epochs=1", "batch_size=64", "holdout=800", *QUIET)
    done = start("dist_train.main", "--config", path, *settings, "--run-dir", tmp_path / "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]]
    assert len(losses) == 9
    assert losses[-1] < losses[0] - 0.05
