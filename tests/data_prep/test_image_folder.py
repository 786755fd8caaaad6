"""A folder of one's own images: written into betons, then trained on, as a user does it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, command, environment
from PIL import Image, ImageDraw
from test_data_prep import edit_manifest, refused, run_here, snapshot

from dist_train import config, data_prep
from dist_train.config import loading
from dist_train.config.settings import Block, Convolution, DataConfig, TrainConfig
from dist_train.data.batches import Data
from dist_train.data.dataset import manifest, prepare
from dist_train.data_prep import folders
from dist_train.distributed.ranks import Ranks
from dist_train.errors import UserError
from dist_train.runs.metrics import read_metrics

EXAMPLES = REPOSITORY / "dist_train" / "examples"
COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "orange", "purple")
CPU = torch.device("cpu")
QUIET = ("record.wandb=disabled", "train.device=cpu", "precision=fp32")


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


def put(source: Path, *folders: str, count: int = 5) -> None:
    """Images of a few pixels, each another, in folders of `source`."""
    for folder in folders:
        (source / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colour = hashlib.sha256(f"{folder} {number}".encode()).digest()[:3]
            Image.new("RGB", (4, 4), tuple(colour)).save(source / folder / f"{number}.png")


def taken(source: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """The number of images of each class in each split of the betons, and what the manifest says was skipped, by the
    reason; the same is said on stderr."""
    out = source.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    found = data_prep.prepare("own", out, source, image_size=4)
    assert data_prep.check(out) == found
    said = capsys.readouterr().err
    for part in found.skipped:
        assert part.count == len(part.paths)
        assert f"data_prep: skipped {part.count}, since {part.reason}: {', '.join(part.paths[:3])}" in said
    labels = {split: data_prep.read_split(out, split)[1] for split in found.splits}
    counts = {split: dict(zip(found.classes, np.bincount(of).tolist(), strict=True)) for split, of in labels.items()}
    return counts, {part.reason: [*part.paths] for part in found.skipped}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("train", "test"), ("train", "val"), ("Training", "Testing"), ("TRAIN", "TEST"), ("train", "Validation")),
        *(("train_set", "test_set"), ("TrainingSet", "TestSet"), ("trainset", "valset"), ("train2017", "val2017")),
        *(("seg_train", "seg_test"), ("train-images", "test-images"), ("training_data", "dev"), ("trn", "tst")),
        *(("seg_train/seg_train", "seg_test/seg_test"), ("Train", "valid"), ("train", "eval")),
    ],
)
def test_splits_have_any_of_the_usual_names(
    tmp_path: Path, train: str, test: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    put(source, f"{train}/cat", f"{train}/dog")
    put(source, f"{test}/dog/below", f"{test}/cat", count=3)
    assert taken(source, capsys) == ({"train": {"cat": 5, "dog": 5}, "test": {"cat": 3, "dog": 3}}, {})


@pytest.mark.parametrize("names", [("train", "bus"), ("bullet_train", "test"), ("dev", "test"), ("trains", "tests")])
def test_classes_may_be_called_like_splits(
    tmp_path: Path, names: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in", *names)
    assert taken(tmp_path / "in", capsys)[0]["test"] == dict.fromkeys(sorted(names), 1)


def test_what_is_skipped_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    put(source, "train/cat", "train/dog", "test/cat", "test/dog", "val/cat", "extra/more", "train/.cache", count=2)
    for name in ("notes.txt", "train/labels.csv", "train/cat/page.html", "train/cat/._0.png", "train/cat/deep/a.heic"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("no image")
    for name in ("loose.png", "test/loose.jpg"):
        Image.new("RGB", (4, 4)).save(source / name)
    (source / "train" / "kitten").symlink_to("cat")
    (source / "train" / "dog" / "up").symlink_to(source)
    put(tmp_path / "elsewhere", "b", count=3)
    (source / "train" / "dog" / "linked").symlink_to(tmp_path / "elsewhere")  # read
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path)
    counts, skipped = taken(source, capsys)
    assert counts == {"train": {"cat": 2, "dog": 5}, "test": {"cat": 2, "dog": 2}}
    assert skipped == {
        folders.NO_CLASS: ["loose.png", "test/loose.jpg"],
        folders.NO_IMAGES: ["notes.txt", "train/labels.csv", "train/cat/page.html", "train/cat/deep/a.heic"],
        folders.BESIDE: ["extra/more/0.png", "extra/more/1.png"],
        folders.HIDDEN: ["train/.cache", "train/cat/._0.png"],
        folders.LINKS: ["train/kitten", "train/dog/up", "train/dog/linked/round"],
        folders.VALIDATION: ["val/cat/0.png", "val/cat/1.png"],
    }


@pytest.mark.parametrize("inside", ["", "unknown", "test"])
@pytest.mark.parametrize("name", ["test", "Testing"])
def test_a_test_split_without_labels_is_skipped(
    tmp_path: Path, name: str, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    put(source, "train/cat", "train/dog")
    put(source, f"{name}/{inside}", count=2)
    counts, skipped = taken(source, capsys)
    assert counts == {"train": {"cat": 4, "dog": 4}, "test": {"cat": 1, "dog": 1}}
    place = Path(name, inside).as_posix()
    assert skipped == {folders.UNLABELLED: [f"{place}/0.png", f"{place}/1.png"]}
    put(source, "val/cat", "val/dog", count=2)
    assert taken(source, capsys)[0] == {"train": {"cat": 5, "dog": 5}, "test": {"cat": 2, "dog": 2}}


def test_test_images_that_are_training_images_too_are_counted_named_and_dropped_on_request(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    put(source, "train/cat", "train/dog", "test/cat", "test/dog")
    Image.open(source / "train/cat/1.png").save(source / "train/dog/again.bmp")  # the pixels count, not the file
    Image.open(source / "train/cat/1.png").save(source / "test/cat/5.tif")
    shutil.copy(source / "train/dog/2.png", source / "test/cat/6.png")  # of another class
    result = write(out, source, 4)
    assert "2 of the 12 test images have the pixels of training images (test/cat/" in result.stderr
    assert "; --drop-equal, in a training data.drop_equal=true, drops these training images\n" in result.stderr
    equal = data_prep.check(out).equal_images
    assert equal is not None
    assert (equal.count, equal.dropped) == (2, 0)
    pairs = dict(equal.examples)
    assert pairs["test/cat/6.png"] == "train/dog/2.png"
    assert pairs["test/cat/5.tif"] in ("train/cat/1.png", "train/dog/again.bmp")
    refused(write(out, source, 4, "--drop-equal"), "written without --drop-equal: choose another --out, or delete")
    with pytest.raises(
        UserError, match=r"written without data\.drop_equal = true; set data\.dir=.*--drop-equal"
    ) as said:
        manifest(DataConfig("shapes", str(out), source=str(source), image_size=4, drop_equal=True))
    words = shlex.split(str(said.value).partition(" that with ")[2])
    result = run_here(*words[3:])
    assert "; 3 of these training images are dropped\n" in result.stderr
    fresh = DataConfig("shapes", words[-1], drop_equal=True)
    equal = manifest(fresh).equal_images
    assert equal is not None
    assert (equal.count, equal.dropped) == (0, 3)
    train, test = ({i.tobytes() for i in data_prep.read_split(fresh.folder, split)[0]} for split in ("train", "test"))
    assert (len(train), len(test), train & test) == (8, 12, set())
    put(source, "train/only", "test/only", count=1)
    shutil.copy(source / "train/only/0.png", source / "test/only/0.png")
    with pytest.raises(UserError, match=r"^data\.drop_equal leaves no training image of only"):
        prepare(DataConfig("shapes", str(tmp_path / "third"), str(source), 4, drop_equal=True))


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    owner = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]  # root may read everything
    if not shutil.which("unshare") or subprocess.run([*owner, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare is refused here: no user without root's rights can be made")
    source = tmp_path / "in"
    put(source, "cat", "dog/deep")
    (source / "dog" / "deep").chmod(0)
    words = ["--dataset", "own", "--source", str(source), "--image-size", "4", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*owner, sys.executable, "-m", "dist_train.data_prep", *words], cwd=REPOSITORY, capture_output=True, text=True
    )
    (source / "dog" / "deep").chmod(0o700)
    refused(done, f"{source / 'dog' / 'deep'} cannot be read (Permission denied)", "change its permissions")


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


def with_two_training_sets(source: Path) -> None:
    put(source, "train/a", "train/b", "Training/a", "test/a")


def with_a_training_set_beside_a_class(source: Path) -> None:
    put(source, "train/a", "train/b")


def within_a_folder(source: Path) -> None:
    for path in source.iterdir():
        shutil.rmtree(path)
    put(source, "archive/a", "archive/b")


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
        (with_two_training_sets, ["several folders for one split, Training, train", "keep one of them"]),
        (with_a_training_set_beside_a_class, ["holds train, a folder of folders, beside class00", "give --source"]),
        (within_a_folder, ["holds one class, archive", "for example {source}/archive"]),
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
        assert word.format(source=source) in str(caught.value)
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
    env = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    return forked.run(command(*arguments, module=module), folder, env)


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
    for number in range(1, 10):
        shutil.copy(source / "class00" / "000.png", source / "class00" / f"{number:03}.png")
    example = ("--config", EXAMPLES / "image_folder.toml", f"data.source={source}", "epochs=2")
    done = start("dist_train quickstart", *example, *QUIET, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mine: 128 training and 32 test images" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert summary(run)["steps"] == 2
    found = data_prep.check(tmp_path / "data" / "mine")
    assert found.image_shape == (64, 64, 3)
    assert found.equal_images is not None
    assert summary(run)["equal_images"] == found.equal_images.count > 0
    assert start("dist_train report", run, "--out", run / "report.html", folder=tmp_path).returncode == 0
    words = f"{found.equal_images.count} of the test images of {run.name} have the pixels of training images."
    assert words in (run / "report.html").read_text()


def test_many_classes_and_small_images_give_the_same_weights_from_both_loaders(tmp_path: Path) -> None:
    source = draw(tmp_path / "in", classes=37, count=5)
    own = ("data.dataset=shapes", f"data.source={source}", "image_size=20", "translate=3", "cutout=5", "holdout=20")
    smaller = "data.smaller=[{size = 10, until = 0.25}, {size = 13, until = 0.5, how = 'scale'}]"
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
        data = Data(settings, TrainConfig(batch_size=8, microbatches=4), manifest(settings), Ranks(0, 1, CPU, CPU))
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
    blocks = loading.read_toml(path)["model"]["blocks"]
    assert {key for block in blocks for key in block} == {field.name for field in dataclasses.fields(Block)}
    shown = {key for block in blocks for convolution in block["convolutions"] for key in convolution}
    assert shown == {field.name for field in dataclasses.fields(Convolution)}
    settings = ("data.dataset=digits", f"data.dir={digits}", "epochs=1", "batch_size=64", "holdout=800", *QUIET)
    done = start("dist_train.main", "--config", path, *settings, "--run-dir", tmp_path / "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]]
    assert len(losses) == 9
    assert losses[-1] < losses[0] - 0.05
