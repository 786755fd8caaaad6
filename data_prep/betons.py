"""A prepared data set: a folder with train.beton, test.beton, and a manifest.json with their checksums."""

import hashlib
import json
import math
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_prep import beton_file, ffcv_library
from dist_train.data_prep.beton_file import BetonFile, Images, Labels
from dist_train.data_prep.datasets import DATASETS, Pixels, load
from dist_train.data_prep.files import DataError, locked, sha256_of, sync, temporary
from dist_train.data_prep.folders import TEST_FRACTION, Skipped, few
from dist_train.data_prep.images import load_images
from dist_train.errors import say

FORMAT = 1  # of manifest.json; raise it when the meaning of a prepared folder changes
MANIFEST = "manifest.json"
SPLITS = ("train", "test")
_EXAMPLES = 100  # pairs of equal images in a manifest
OWN_FILES = {MANIFEST, *(f"{split}.beton" for split in SPLITS)}


@dataclass(frozen=True)
class Split:
    """One beton file: its number of samples, its name in the folder, its size in bytes and two SHA-256 sums in hex.

    file_sha256 is of the file; content_sha256 of its decoded content: the uint8 NHWC image bytes, then the
    labels as little-endian int64.
    """

    count: int
    file: str
    bytes: int
    file_sha256: str
    content_sha256: str


@dataclass(frozen=True)
class EqualImages:
    """What the splits have in common. count: the test images whose pixels are those of a training image. examples: the
    first of them, each with such a training image. dropped: training images that were dropped because they were equal
    to a test image."""

    count: int
    examples: tuple[tuple[str, str], ...]
    dropped: int = 0


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    image_shape is (H, W, C); mean and std are the train split's, one number in 0..1 for each channel. ffcv_version: of
    the ffcv that wrote the files; None if beton_file.write did. source: path of the folder of images, None for the data
    sets in DATASETS. test_fraction: share of each class for the test split of a folder without one. grey_bits: of the
    grey values in pictures of 16 bits, as in `pictures.read_picture`; None where there are none. skipped: files of the
    source that are in no split. equal_images: None where an earlier version wrote the files.
    """

    dataset: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, Split]
    ffcv_version: str | None
    source: str | None = None
    test_fraction: float | None = None
    grey_bits: int | None = None
    skipped: tuple[Skipped, ...] = ()
    equal_images: EqualImages | None = None


def command(
    dataset: str,
    out: Path,
    source: Path | None = None,
    image_size: int = 0,
    test_fraction: float | None = None,
    drop_equal: bool = False,
) -> str:
    """The data_prep command that writes a data set; DIR and SIZE stand for a missing source and image size."""
    words = ["python", "-m", "dist_train.data_prep", "--dataset", dataset]
    own = dataset not in DATASETS
    if source or own:
        words += ["--source", str(source or "DIR")]
    if own:
        words += ["--image-size", str(image_size or "SIZE")]
    if test_fraction is not None:
        words += ["--test-fraction", str(test_fraction)]
    if drop_equal:
        words += ["--drop-equal"]
    return shlex.join([*words, "--out", str(out)])


def same_source(manifest: Manifest, source: Path | None) -> bool:
    """Whether a data set was written from `source`, or may have been because one of the two is unknown."""
    return source is None or manifest.source is None or str(source.resolve()) == manifest.source


def may_share_images(manifest: Manifest) -> bool:
    """Whether test images may be equal to training images."""
    return manifest.equal_images is None or manifest.equal_images.count > 0


def check(folder: Path, write: str = "") -> Manifest:
    """The manifest of a prepared folder, after a check that is fast enough for every start of a training.

    Checks that the manifest has this module's format, that both files have the size and SHA-256 in the manifest,
    and that their tables match it. Imports neither ffcv nor torch. write: the command that writes the folder, for
    messages; derived from the folder unless given. Raises DataError.
    """
    manifest = read_manifest(folder, write)
    remedy = _remedy(folder, write or _command(folder, manifest))
    for name, split in manifest.splits.items():
        path = folder / split.file
        try:
            size = path.stat().st_size
            if size != split.bytes:
                raise DataError(f"{path} has {size} bytes where {MANIFEST} has {split.bytes}: {remedy}")
            if sha256_of(path) != split.file_sha256:
                raise DataError(f"{path} was altered (its SHA-256 is not the one in {MANIFEST}): {remedy}")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        _open(folder, name, manifest, write)
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of a prepared folder, after check() and a comparison of all decoded samples, their mean and their
    standard deviation with it. Raises DataError."""
    manifest = check(folder)
    remedy = _remedy(folder, _command(folder, manifest))
    for name, split in manifest.splits.items():
        images, labels = read_split(folder, name)
        path = folder / split.file
        if _content_sha256(images, labels) != split.content_sha256:
            raise DataError(f"{path} decodes to other samples than {MANIFEST} describes: {remedy}")
        if name == "train":
            mean, std = _mean_and_std(images)
            pairs = zip(mean + std, manifest.mean + manifest.std, strict=True)
            if not all(math.isclose(actual, expected, rel_tol=1e-9) for actual, expected in pairs):
                raise DataError(f"{folder / MANIFEST} has a mean or std that {path} contradicts: {remedy}")
    return manifest


def read_split(folder: Path, split: str) -> tuple[Images, Labels]:
    """Read one split ("train" or "test"): images uint8 (N, H, W, 3), labels int64 (N,).

    Index i is sample i of the data set. Does not compute checksums (check() does). Raises DataError, also for a file
    whose tables do not match the manifest.
    """
    file = open_split(folder, split)
    return file.images(), file.labels


def open_split(folder: Path, split: str) -> BetonFile:
    """The file of one split ("train" or "test"), open for reading, after a check of its tables.

    The number of samples, their size and the range of their labels match the manifest, and all offsets lie inside the
    file, which ffcv's reader does not check itself. Raises DataError.
    """
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise DataError(f"split {split!r} is not in {folder}: choose one of {', '.join(SPLITS)}")
    return _open(folder, split, manifest)


def prepare(
    dataset: str,
    out: Path,
    source: Path | None = None,
    *,
    image_size: int = 0,
    test_fraction: float | None = None,
    drop_equal: bool = False,
    force: bool = False,
) -> Manifest:
    """Write the data set into the folder `out` unless it is there already, and return its manifest.

    dataset: a name in DATASETS, or any other name for a folder of images: these become image_size x image_size pixels,
    and the share test_fraction of them the test split (see images.py). source: the folder of images, or the one with
    the official files (see datasets.py); not needed if `out` is complete. drop_equal: drop the training images
    whose pixels are those of a test image.

    A complete folder is only checked. force: write the folder again even if it is complete or damaged. Several
    processes may call this at once: one writes while the others wait. The folder is published atomically. Raises
    DataError for bad input, a damaged folder, or one with another data set or other files; its subclass NoNetworkError
    if a download failed.
    """
    if image_size < 0:
        raise DataError(f"--image-size {image_size} is not a number of pixels: give one above 0")
    if image_size**2 * 3 > beton_file.LARGEST_IMAGE:
        raise DataError(
            f"--image-size {image_size} is more than a beton can hold: give at most "
            f"{math.isqrt(beton_file.LARGEST_IMAGE // 3)}"
        )
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise DataError(f"--test-fraction {test_fraction} is not a share of the images: give one between 0 and 1")
    if dataset in DATASETS and (image_size or test_fraction is not None):
        setting = f"--image-size {image_size}" if image_size else f"--test-fraction {test_fraction}"
        raise DataError(
            f"{setting} is for images of your own, not for {dataset}: remove it, or give your images another name with "
            f"--dataset"
        )
    write = command(dataset, out, source, image_size, test_fraction, drop_equal)
    asked = (source, image_size, test_fraction, drop_equal)
    if not force and (existing := _existing(out, dataset, *asked, write)):
        return existing  # without the lock, so that a complete folder may be on a read-only disk
    if dataset not in DATASETS and source is None:
        raise DataError(
            f"data set {dataset!r} is unknown: choose one of {', '.join(DATASETS)}, or give a folder of images of your "
            f"own with --source and --image-size"
        )
    if dataset not in DATASETS and not image_size:
        raise DataError(
            f"--image-size is missing: give the side in pixels that the images of {dataset} are to have, for example "
            f"--image-size 64"
        )
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file: choose a folder")
    real = out.resolve()  # without symbolic links, since the folder is published by renaming its sibling
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with locked(real.parent / f".{real.name}.lock"):
            # only the holder of the lock creates these two, so existing ones were left by a killed process
            fresh, old = temporary(real, "new"), temporary(real, "old")
            for leftover in (fresh, old):
                if leftover.exists():
                    shutil.rmtree(leftover)
            if not force and (existing := _existing(out, dataset, *asked, write)):
                return existing
            if foreign := _foreign(real):
                raise DataError(f"--out {out} also holds {foreign[0]}: choose a separate folder")
            try:
                pixels, equal = _compared(_load(dataset, source, image_size, test_fraction), drop_equal)
                say(f"writing {dataset} into {out}", "data_prep")
                manifest = _write(dataset, pixels, equal, fresh, source, test_fraction)
                if real.exists():
                    real.rename(old)
                fresh.rename(real)
                sync(real.parent)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
            return manifest
    except OSError as error:
        raise DataError(
            f"--out {out} cannot be written ({error.strerror or error}): "
            "choose a folder that is writable, on a disk with enough space"
        ) from error


def _existing(
    out: Path,
    dataset: str,
    source: Path | None,
    image_size: int,
    test_fraction: float | None,
    drop_equal: bool,
    write: str,
) -> Manifest | None:
    """The checked manifest of `out`, None if it is missing or empty. write: the command that writes the data set.
    Raises DataError for a damaged folder, and for one with another data set."""
    try:
        if not any(out.iterdir()):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None  # a file in its place is reported when the folder is written
    except OSError as error:
        raise DataError(f"--out {out} cannot be read ({error.strerror}): choose another folder") from error
    manifest = check(out, write)
    height, width, _ = manifest.image_shape
    content = ""
    if manifest.dataset != dataset:
        content = f"the data set {manifest.dataset}, not {dataset}"
    elif not same_source(manifest, source):
        content = f"the images of {manifest.source}, not of {source}"
    elif image_size and (height, width) != (image_size, image_size):
        content = f"images of {width}x{height} pixels, not {image_size}x{image_size}"
    elif test_fraction is not None and manifest.test_fraction != test_fraction:
        content = f"a data set written with --test-fraction {manifest.test_fraction}, not {test_fraction}"
    elif drop_equal and may_share_images(manifest):
        content = "a data set written without --drop-equal"
    if content:
        raise DataError(f"{out} holds {content}: choose another --out, or {_remedy(out, write)}")
    return manifest


def _foreign(folder: Path) -> list[str]:
    """Names of files in a folder that data_prep does not write, and so neither deletes nor advises to delete."""
    return sorted(p.name for p in folder.iterdir() if p.name not in OWN_FILES) if folder.is_dir() else []


def _remedy(folder: Path, write: str) -> str:
    """The remedy for a damaged folder, for a message. write: the command that writes the folder."""
    if foreign := _foreign(folder):
        return f"use a separate folder for the data set, since this one also holds {foreign[0]}"
    return f"delete the folder {shlex.quote(str(folder))} and run {write}" if folder.is_dir() else f"run {write}"


def _command(folder: Path, manifest: Manifest | None = None) -> str:
    """The command that writes a folder: from its manifest, or else from the folder's name."""
    if manifest is not None:
        source = Path(manifest.source) if manifest.source else None
        dropped = manifest.equal_images is not None and manifest.equal_images.dropped > 0
        return command(manifest.dataset, folder, source, manifest.image_shape[0], drop_equal=dropped)
    return command(folder.name if folder.name in DATASETS else "cifar10", folder)


def _open(folder: Path, split: str, manifest: Manifest, write: str = "") -> BetonFile:
    """The open file of a split, checked against the manifest. write: as in check(). Raises DataError."""
    path, expected = folder / manifest.splits[split].file, manifest.splits[split]
    try:
        return _opened(path, expected.count, manifest.image_shape, len(manifest.classes))
    except (OSError, ValueError) as error:
        remedy = _remedy(folder, write or _command(folder, manifest))
        raise DataError(f"{path} cannot be decoded ({error}): {remedy}") from error


def _opened(path: Path, count: int, shape: tuple[int, ...], classes: int) -> BetonFile:
    """The open file, checked for its number of samples, image shape and labels. Raises OSError and ValueError."""
    file = BetonFile(path)
    if len(file.labels) != count or file.shape != shape:
        raise ValueError(f"it does not hold {count} raw images of {shape[1]}x{shape[0]} pixels with a label each")
    if file.labels.min() < 0 or file.labels.max() >= classes:
        raise ValueError(f"it has labels up to {file.labels.max()} where the manifest has {classes} classes")
    return file


def read_manifest(folder: Path, write: str = "") -> Manifest:
    """The manifest of a folder, with every entry checked. write: as in check(). Raises DataError."""
    path = folder / MANIFEST
    write = write or _command(folder)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path} is missing, so there is no data set there: {_remedy(folder, write)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a manifest of data_prep: {_remedy(folder, write)}") from error
    if not isinstance(raw, dict) or type(raw.get("format")) is not int:
        raise DataError(f"{path} is not a manifest of data_prep: {_remedy(folder, write)}")
    if raw["format"] != FORMAT:
        raise DataError(
            f"{path} has format {raw['format']} but this version reads format {FORMAT}: {_remedy(folder, write)}"
        )
    try:
        if any(type(raw[key]) is not list for key in ("classes", "image_shape", "mean", "std")):
            raise TypeError
        height, width, channels = raw["image_shape"]
        manifest = Manifest(
            dataset=raw["dataset"],
            classes=tuple(raw["classes"]),
            image_shape=(height, width, channels),
            mean=tuple(raw["mean"]),
            std=tuple(raw["std"]),
            splits={name: Split(**raw["splits"][name]) for name in SPLITS},
            ffcv_version=raw["ffcv_version"],
            source=raw.get("source"),
            test_fraction=raw.get("test_fraction"),
            grey_bits=raw.get("grey_bits"),
            equal_images=_equal_images(raw["equal_images"]) if raw.get("equal_images") else None,
            skipped=tuple(
                Skipped(part["reason"], part["count"], tuple(part["paths"])) for part in raw.get("skipped", [])
            ),
        )
        if not _is_valid(manifest):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} has missing or damaged entries: {_remedy(folder, write)}") from error
    return manifest


def _equal_images(raw: dict[str, Any]) -> EqualImages:
    examples = tuple((test, training) for test, training in raw["examples"])
    return EqualImages(raw["count"], examples, raw["dropped"])


def _is_valid(manifest: Manifest) -> bool:
    """Whether every value has the type and range that the rest of the code relies on."""
    texts = [manifest.dataset, *manifest.classes]
    sizes: list[int] = [*manifest.image_shape]
    for split in manifest.splits.values():
        texts += [split.file, split.file_sha256, split.content_sha256]
        sizes += [split.count, split.bytes]
    texts += [text for text in (manifest.ffcv_version, manifest.source) if text is not None]
    sizes += [bits for bits in (manifest.grey_bits,) if bits is not None]
    if equal := manifest.equal_images:
        texts += [name for pair in equal.examples for name in pair]
        sizes += [1 + equal.count, 1 + equal.dropped]  # may be 0
    for part in manifest.skipped:
        texts += [part.reason, *part.paths]
        sizes.append(part.count)
    numbers = [*manifest.mean, *manifest.std]
    if manifest.test_fraction is not None:
        numbers.append(manifest.test_fraction)
    return (
        all(type(text) is str for text in texts)
        and all(type(size) is int and size > 0 for size in sizes)
        and all(type(number) is float and 0 <= number <= 1 for number in numbers)
        and len(manifest.mean) == len(manifest.std) == manifest.image_shape[2] == 3
        and min(manifest.std) > 0
        and len(manifest.classes) > 0
        and all(split.file == f"{name}.beton" for name, split in manifest.splits.items())
    )


def _load(dataset: str, source: Path | None, image_size: int, test_fraction: float | None) -> Pixels:
    try:
        if dataset in DATASETS:
            return load(dataset, source)
        assert source is not None
        return load_images(source, image_size, test_fraction)
    except OSError as error:
        if source is None:
            raise
        raise DataError(f"--source {source} cannot be read ({error.strerror or error}): choose another") from error


def _compared(pixels: Pixels, drop: bool) -> tuple[Pixels, EqualImages]:
    """Compare every test image with all training images, and say on stderr which are equal. drop: drop these
    training images. Raises DataError where none of a class would be left."""
    digests = {
        split: [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]
        for split, (images, _) in pixels.splits.items()
    }
    first: dict[bytes, int] = {}
    for index, digest in enumerate(digests["train"]):
        first.setdefault(digest, index)
    shared = [(index, first[digest]) for index, digest in enumerate(digests["test"]) if digest in first]
    if not shared:
        return pixels, EqualImages(0, ())

    def name(split: str, index: int) -> str:
        return pixels.names[split][index] if pixels.names else f"{split} image {index}"

    pairs = [(name("test", test), name("train", training)) for test, training in shared]
    said = (
        f"{len(pairs):,} of the {len(digests['test']):,} test images have the pixels of training images "
        f"({few([f'{test} = {training}' for test, training in pairs])})"
    )
    examples = tuple(pairs[:_EXAMPLES])
    if not drop:
        remedy = "--drop-equal, in a training data.drop_equal=true, drops these training images"
        say(f"{said}; {remedy}", "data_prep")
        return pixels, EqualImages(len(shared), examples)
    of_both = {*digests["test"]} & first.keys()
    kept = np.array([index for index, digest in enumerate(digests["train"]) if digest not in of_both], np.int64)
    images, labels = pixels.splits["train"]
    if gone := [pixels.classes[label] for label in sorted({*labels.tolist()} - {*labels[kept].tolist()})]:
        raise DataError(
            f"--drop-equal leaves no training image of {few(gone)}, since all of them are test images too: remove it, "
            f"or add images"
        )
    dropped = len(images) - len(kept)
    say(f"{said}; {dropped:,} of these training images are dropped", "data_prep")
    splits = {**pixels.splits, "train": (images[kept], labels[kept])}
    return replace(pixels, splits=splits), EqualImages(0, examples, dropped)


def _write(
    dataset: str, pixels: Pixels, equal: EqualImages, folder: Path, source: Path | None, test_fraction: float | None
) -> Manifest:
    """Write a data set into a new folder, and read every file back; the manifest is written last."""
    origin = None
    if dataset not in DATASETS and source is not None:
        origin, test_fraction = str(source.resolve()), test_fraction or TEST_FRACTION
    version = ffcv_library.version()
    write_file = ffcv_library.write if version else beton_file.write
    folder.mkdir()
    splits = {}
    for name in SPLITS:
        images, labels = pixels.splits[name]
        path = folder / f"{name}.beton"
        write_file(path, images, labels)
        content = _content_sha256(images, labels)
        sync(path)
        try:
            file = _opened(path, len(images), images.shape[1:], len(pixels.classes))
            same = _content_sha256(file.images(), file.labels) == content
        except ValueError:
            same = False
        if not same:
            raise OSError(f"{path.name} reads back differently from what was written")
        splits[name] = Split(len(images), path.name, path.stat().st_size, sha256_of(path), content)
    mean, std = _mean_and_std(pixels.splits["train"][0])
    height, width, channels = pixels.splits["train"][0].shape[1:]
    shape = (height, width, channels)
    manifest = Manifest(
        *(dataset, pixels.classes, shape, mean, std, splits, version, origin, test_fraction),
        *(pixels.grey_bits, pixels.skipped, equal),
    )
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)
    return manifest


def _content_sha256(images: Images, labels: Labels) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _mean_and_std(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel, in 0..1, from exact integer sums. The deviation is 1
    for a channel that varies by less than one of 256 levels: dividing by its own would amplify noise, or fail."""
    counts = np.zeros((3, 256), np.int64)  # histogram of each channel's values
    for start in range(0, len(images), 1000):
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 1000, :, :, channel].ravel(), minlength=256)
    pixels, values = int(counts[0].sum()), np.arange(256)
    totals = [int(row @ values) for row in counts]
    squares = [int(row @ values**2) for row in counts]
    mean = tuple(total / pixels / 255 for total in totals)
    levels = (math.sqrt(pixels * square - total**2) / pixels for total, square in zip(totals, squares, strict=True))
    return mean, tuple(level / 255 if level >= 1 else 1.0 for level in levels)
