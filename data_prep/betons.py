"""A prepared data set: a folder with train.beton, test.beton and the manifest.json that vouches for them."""

import hashlib
import json
import math
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dist_train.data_prep import beton_file, ffcv_library
from dist_train.data_prep.beton_file import BetonFile, Images, Labels
from dist_train.data_prep.datasets import DATASETS, Pixels, load
from dist_train.data_prep.files import DataError, locked, sha256_of, sync
from dist_train.data_prep.images import TEST_FRACTION, load_images

FORMAT = 1  # of manifest.json; raise it when what a folder holds changes its meaning
MANIFEST = "manifest.json"
SPLITS = ("train", "test")
OUR_FILES = {MANIFEST, *(f"{split}.beton" for split in SPLITS)}


@dataclass(frozen=True)
class Split:
    """One beton file: its samples, its name in the folder, its size in bytes and two SHA-256 sums in hex.

    file_sha256 is of the file; content_sha256 of what it decodes to: the uint8 NHWC image bytes, then the
    labels as little-endian int64.
    """

    count: int
    file: str
    bytes: int
    file_sha256: str
    content_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    image_shape is (H, W, C); mean and std are the train split's, one number in 0..1 for each channel. ffcv_version: of
    the ffcv that wrote the files; None if beton_file.write did. Of a folder of images: source, its path, and
    test_fraction, by which it was, or would have been, divided.
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


def command(
    dataset: str, out: Path, source: Path | None = None, image_size: int = 0, test_fraction: float | None = None
) -> str:
    """The data_prep command that writes a data set; DIR or SIZE stand for what is needed and not given."""
    words = ["python", "-m", "dist_train.data_prep", "--dataset", dataset]
    own = dataset not in DATASETS
    if source or own:
        words += ["--source", str(source or "DIR")]
    if own:
        words += ["--image-size", str(image_size or "SIZE")]
    if test_fraction is not None:
        words += ["--test-fraction", str(test_fraction)]
    return shlex.join([*words, "--out", str(out)])


def same_source(manifest: Manifest, source: Path | None) -> bool:
    """Whether a data set may have been written from `source`: it was, or one of the two is not known."""
    return source is None or manifest.source is None or str(source.resolve()) == manifest.source


def check(folder: Path, write: str = "") -> Manifest:
    """The manifest of a prepared folder, after a fast check that trainers can afford at every start.

    Checks that the manifest is readable and of our format, that both files are there with the right size
    and SHA-256, and that their tables fit it. Imports neither ffcv nor torch. write: the command that writes the
    folder, for messages; guessed from the folder unless given. Raises DataError.
    """
    manifest = _read_manifest(folder, write)
    remedy = _remedy(folder, write or _command(folder, manifest))
    for name, split in manifest.splits.items():
        path = folder / split.file
        try:
            size = path.stat().st_size
            if size != split.bytes:
                raise DataError(f"{path} has {size} bytes where {MANIFEST} says {split.bytes}: {remedy}")
            if sha256_of(path) != split.file_sha256:
                raise DataError(f"{path} was altered (its SHA-256 is not the one in {MANIFEST}): {remedy}")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
        _open(folder, name, manifest, write)
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of a prepared folder, after check() and then decoding all samples.

    Compares counts, decoded content, and mean and std. Raises DataError.
    """
    manifest = check(folder)
    remedy = _remedy(folder, _command(folder, manifest))
    for name, split in manifest.splits.items():
        images, labels = read_split(folder, name)
        path = folder / split.file
        if _content_sha256(images, labels) != split.content_sha256:
            raise DataError(f"{path} decodes to other samples than {MANIFEST} says: {remedy}")
        if name == "train":
            mean, std = _mean_and_std(images)
            pairs = zip(mean + std, manifest.mean + manifest.std, strict=True)
            if not all(math.isclose(real, told, rel_tol=1e-9) for real, told in pairs):
                raise DataError(f"{folder / MANIFEST} has a mean or std that {path} contradicts: {remedy}")
    return manifest


def read_split(folder: Path, split: str) -> tuple[Images, Labels]:
    """Read one split ("train" or "test"): images uint8 (N, H, W, 3), labels int64 (N,).

    Index i is sample i of the data set. Does not compute checksums (check() does), but refuses a file whose
    tables do not fit the manifest. Raises DataError.
    """
    file = open_split(folder, split)
    return file.images(), file.labels


def open_split(folder: Path, split: str) -> BetonFile:
    """The file of one split, open for reading, after a look at the tables in it.

    Neither BetonFile's nor ffcv's reader can then leave the file, and the number of samples, their size and the range
    of their labels are what the manifest says. Raises DataError.
    """
    manifest = _read_manifest(folder)
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
    force: bool = False,
) -> Manifest:
    """Make sure that the folder `out` holds the data set, and return its manifest.

    dataset: a name in DATASETS, or any other for a folder of images of one's own: these become image_size x image_size
    pixels, and test_fraction of them the test split (see images.py). source: the folder of images, or the one with the
    official files (see datasets.py); not needed for a folder that is complete.

    A folder that is already complete is only checked, and a damaged or foreign one is refused unless force
    is true, which writes it anew. Any number of processes may call this at once: one writes, the others
    wait. The folder appears whole or not at all. Raises DataError; its subclass files.NoNetworkError if a download
    failed.
    """
    if image_size < 0:
        raise DataError(f"--image-size {image_size} is no number of pixels: give one above 0")
    if image_size**2 * 3 > beton_file.LARGEST_IMAGE:
        raise DataError(
            f"--image-size {image_size} is more than a beton has room for: give "
            f"{math.isqrt(beton_file.LARGEST_IMAGE // 3)} at most"
        )
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise DataError(f"--test-fraction {test_fraction} is no share of the images: give one between 0 and 1")
    if dataset in DATASETS and (image_size or test_fraction is not None):
        setting = f"--image-size {image_size}" if image_size else f"--test-fraction {test_fraction}"
        raise DataError(
            f"{setting} is for images of your own, not for {dataset}: leave it out, or give them a name of their own "
            f"with --dataset"
        )
    write = command(dataset, out, source, image_size, test_fraction)
    if not force and (found := _existing(out, dataset, source, image_size, test_fraction, write)):
        return found  # without the lock, so that a finished folder may lie on a read-only disk
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
    real = out.resolve()  # through links, since the folder is published by renaming its neighbour
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        with locked(real.parent / f".{real.name}.lock"):
            # Only the holder of the lock ever has these two, so what is there now is a dead writer's.
            fresh, old = real.parent / f".{real.name}.new", real.parent / f".{real.name}.old"
            for leftover in (fresh, old):
                if leftover.exists():
                    shutil.rmtree(leftover)
            if not force and (found := _existing(out, dataset, source, image_size, test_fraction, write)):
                return found
            if foreign := _foreign(real):
                raise DataError(f"--out {out} also holds {foreign[0]}: choose a folder of its own")
            try:
                pixels = _load(dataset, source, image_size, test_fraction)
                print(f"data_prep: writing {dataset} into {out}", file=sys.stderr, flush=True)
                manifest = _write(dataset, pixels, fresh, source, test_fraction)
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
            "choose a folder that can be, on a disk with enough space"
        ) from error


def _existing(
    out: Path, dataset: str, source: Path | None, image_size: int, test_fraction: float | None, write: str
) -> Manifest | None:
    """The checked manifest of `out`, None if there is nothing yet; raises DataError for anything else. write: the
    command that writes what is wanted."""
    try:
        if not any(out.iterdir()):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None  # what is in the way shows when the folder is written
    except OSError as error:
        raise DataError(f"--out {out} cannot be read ({error.strerror}): choose another folder") from error
    manifest = check(out, write)
    height, width, _ = manifest.image_shape
    other = ""
    if manifest.dataset != dataset:
        other = f"the data set {manifest.dataset}, not {dataset}"
    elif not same_source(manifest, source):
        other = f"the images of {manifest.source}, not of {source}"
    elif image_size and (height, width) != (image_size, image_size):
        other = f"images of {width}x{height} pixels, not {image_size}x{image_size}"
    elif test_fraction is not None and manifest.test_fraction != test_fraction:
        other = f"a data set written with --test-fraction {manifest.test_fraction}, not {test_fraction}"
    if other:
        raise DataError(f"{out} holds {other}: choose another --out, or {_remedy(out, write)}")
    return manifest


def _foreign(folder: Path) -> list[str]:
    """Names in a folder that are not ours: data_prep neither deletes them nor advises it."""
    return sorted(p.name for p in folder.iterdir() if p.name not in OUR_FILES) if folder.is_dir() else []


def _remedy(folder: Path, write: str) -> str:
    """What to do about a folder. write: the command that writes it."""
    if foreign := _foreign(folder):
        return f"use a folder of its own for the data set, since this one also holds {foreign[0]}"
    return f"delete the folder {shlex.quote(str(folder))} and run {write}" if folder.is_dir() else f"run {write}"


def _command(folder: Path, manifest: Manifest | None = None) -> str:
    """The command that writes a folder, by its manifest, or else by the default names of folders."""
    if manifest is not None:
        source = Path(manifest.source) if manifest.source else None
        return command(manifest.dataset, folder, source, manifest.image_shape[0])
    return command(folder.name if folder.name in DATASETS else "cifar10", folder)


def _open(folder: Path, split: str, manifest: Manifest, write: str = "") -> BetonFile:
    """The file of a split, which is what the manifest says. write: see check(). Raises DataError."""
    path, expected = folder / manifest.splits[split].file, manifest.splits[split]
    try:
        return _opened(path, expected.count, manifest.image_shape, len(manifest.classes))
    except (OSError, ValueError) as error:
        remedy = _remedy(folder, write or _command(folder, manifest))
        raise DataError(f"{path} cannot be decoded ({error}): {remedy}") from error


def _opened(path: Path, count: int, shape: tuple[int, ...], classes: int) -> BetonFile:
    """The open file, which holds what is expected. Raises OSError or ValueError."""
    file = BetonFile(path)
    if len(file.labels) != count or file.shape != shape:
        raise ValueError(f"it does not hold {count} raw images of {shape[1]}x{shape[0]} pixels with a label each")
    if file.labels.min() < 0 or file.labels.max() >= classes:
        raise ValueError(f"it has labels up to {file.labels.max()} where the manifest has {classes} classes")
    return file


def _read_manifest(folder: Path, write: str = "") -> Manifest:
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
        )
        if not _sensible(manifest):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks or garbles entries of a manifest: {_remedy(folder, write)}") from error
    return manifest


def _sensible(manifest: Manifest) -> bool:
    """Whether every value has the type and range that the rest of the code takes for granted."""
    texts = [manifest.dataset, *manifest.classes]
    sizes: list[int] = [*manifest.image_shape]
    for split in manifest.splits.values():
        texts += [split.file, split.file_sha256, split.content_sha256]
        sizes += [split.count, split.bytes]
    texts += [text for text in (manifest.ffcv_version, manifest.source) if text is not None]
    numbers = [*manifest.mean, *manifest.std]
    if manifest.test_fraction is not None:
        numbers.append(manifest.test_fraction)
    return (
        all(type(text) is str for text in texts)
        and all(type(size) is int and size > 0 for size in sizes)
        and all(type(number) is float and 0 <= number <= 1 for number in numbers)
        and len(manifest.mean) == len(manifest.std) == manifest.image_shape[2] == 3
        and len(manifest.classes) > 0
        and all(split.file == f"{name}.beton" for name, split in manifest.splits.items())
    )


def _load(dataset: str, source: Path | None, image_size: int, test_fraction: float | None) -> Pixels:
    if dataset in DATASETS:
        return load(dataset, source)
    assert source is not None
    return load_images(source, image_size, test_fraction)


def _write(dataset: str, pixels: Pixels, folder: Path, source: Path | None, test_fraction: float | None) -> Manifest:
    """Write a whole data set into a new folder, reading every file back; the manifest comes last."""
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
            good = _content_sha256(file.images(), file.labels) == content
        except ValueError:
            good = False
        if not good:
            raise OSError(f"{path.name} reads back differently from what was written")
        splits[name] = Split(len(images), path.name, path.stat().st_size, sha256_of(path), content)
    mean, std = _mean_and_std(pixels.splits["train"][0])
    height, width, channels = pixels.splits["train"][0].shape[1:]
    shape = (height, width, channels)
    manifest = Manifest(dataset, pixels.classes, shape, mean, std, splits, version, origin, test_fraction)
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
    """Mean and (population) standard deviation of each channel, in 0..1, from exact sums of whole numbers."""
    counts = np.zeros((3, 256), np.int64)  # how often each value occurs in each channel
    for start in range(0, len(images), 1000):
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 1000, :, :, channel].ravel(), minlength=256)
    pixels, values = int(counts[0].sum()), np.arange(256)
    totals = [int(row @ values) for row in counts]
    squares = [int(row @ values**2) for row in counts]
    mean = tuple(total / pixels / 255 for total in totals)
    std = tuple(
        math.sqrt(pixels * square - total**2) / pixels / 255 for total, square in zip(totals, squares, strict=True)
    )
    return mean, std
