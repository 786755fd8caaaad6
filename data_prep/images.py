"""Loads a folder of images of any size and format, in torchvision's ImageFolder layout, as square uint8 RGB images."""

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dist_train.data_prep.datasets import Pixels
from dist_train.data_prep.files import DataError
from dist_train.errors import say

TEST_FRACTION = 0.2  # of each class, where the folder has no test split

# equal to torchvision's IMG_EXTENSIONS, since importing torchvision takes seconds
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Files = dict[str, list[Path]]  # the files of each class, by its name


def load_images(source: Path, size: int, test_fraction: float | None = None) -> Pixels:
    """Load the images in `source`/train/CLASS and `source`/test/CLASS (or val), or else those in `source`/CLASS, of
    which a share of each class becomes the test split.

    Each becomes size x size pixels: its shorter side is scaled, and the middle of the longer one kept. Images are in
    the order of the SHA-256 of their path in `source`, and the first ones of a class are its test images: so classes
    are mixed, and images that are added later move few others between the splits. test_fraction: the share of each
    class, TEST_FRACTION unless given. Raises DataError.
    """
    if not source.is_dir():
        raise DataError(f"--source {source} is not a folder: give one with a folder of images for each class")
    not_images: list[Path] = []
    test = next((source / name for name in ("test", "val") if (source / name).is_dir()), None)
    if test is not None and (source / "train").is_dir():
        if test_fraction is not None:
            raise DataError(
                f"--test-fraction {test_fraction} is not for {source}, which has its own test split: remove it"
            )
        files = {"train": _files(source / "train", not_images), "test": _files(test, not_images)}
        if unknown := [name for name in files["test"] if name not in files["train"]]:
            raise DataError(
                f"{test} has classes that {source / 'train'} does not have, {_few(unknown)}: put images of the same "
                f"classes into both"
            )
        if not files["test"]:
            raise DataError(f"{test} has no folders of classes: give it the same classes as {source / 'train'}")
    else:
        files = _divided(_files(source, not_images), source, test_fraction or TEST_FRACTION)
    classes = tuple(files["train"])
    if len(classes) < 2:
        raise DataError(
            f"{source} holds {f'one class, {classes[0]}' if classes else 'no classes'}: give a folder with a folder of "
            f"images for each class, at least two, or with two such folders train and test"
        )
    say(f"{source} has {len(classes)} classes: {_few([*classes])}", "data_prep")
    if not_images:
        names = _few([str(path.relative_to(source)) for path in not_images])
        say(f"skipped, since their names are not those of images: {names}", "data_prep")

    samples = {
        split: sorted(
            ((path, label) for label, name in enumerate(classes) for path in by_class.get(name, [])),
            key=lambda sample: _sort_key(sample[0], source),
        )
        for split, by_class in files.items()
    }
    count = len(samples["train"])
    images = _read([path for split in samples.values() for path, _ in split], source, size)
    labels = np.array([label for split in samples.values() for _, label in split], np.int64)
    return Pixels(classes, {"train": (images[:count], labels[:count]), "test": (images[count:], labels[count:])})


def _files(folder: Path, not_images: list[Path]) -> Files:
    """The images of each class below `folder`. Files without an image's suffix are appended to `not_images`; hidden
    files and folders are skipped. Raises DataError for a class without images."""
    files: Files = {}
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    for class_folder in classes:
        files[class_folder.name] = []
        for path in sorted(class_folder.rglob("*")):
            if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                (files[class_folder.name] if path.suffix.lower() in SUFFIXES else not_images).append(path)
    if empty := [name for name, paths in files.items() if not paths]:
        raise DataError(
            f"{folder} has no images for {_few(empty)}: put files there ({', '.join(SUFFIXES)}), or remove the folder"
        )
    return files


def _divided(files: Files, source: Path, test_fraction: float) -> dict[str, Files]:
    """The files divided into `train` and `test`, class by class. Raises DataError for a class with a single image."""
    if single := [name for name, paths in files.items() if len(paths) == 1]:
        raise DataError(
            f"{source} has a single image for {_few(single)}, too few for a train and a test split: add images, or "
            f"remove the folder"
        )
    train, test = {}, {}
    for name, paths in files.items():
        ordered = sorted(paths, key=lambda path: _sort_key(path, source))
        count = min(max(round(test_fraction * len(ordered)), 1), len(ordered) - 1)
        test[name], train[name] = ordered[:count], ordered[count:]
    return {"train": train, "test": test}


def _sort_key(path: Path, source: Path) -> bytes:
    """The key that orders images: the SHA-256 of the path in `source`."""
    return hashlib.sha256(os.fsencode(path.relative_to(source).as_posix())).digest()


def _few(names: list[str]) -> str:
    """The first three names, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _read(paths: list[Path], source: Path, size: int) -> npt.NDArray[np.uint8]:
    """The images as (N, size, size, 3) uint8. Raises DataError if any cannot be read, or memory is too small."""
    from tqdm import tqdm

    try:
        images = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError:
        gigabytes = len(paths) * size * size * 3 / 1e9
        raise DataError(
            f"--image-size {size} makes {gigabytes:,.0f} GB of {len(paths)} images, more than fits in memory: use a "
            f"smaller one"
        ) from None

    def read(index: int) -> str:
        """Read one image. Returns "", or its path and why it cannot be read."""
        try:
            with Image.open(paths[index]) as image:
                images[index] = square(image, size)
        except Exception as error:  # Pillow's decoders raise errors of all types, also SyntaxError
            return f"{paths[index].relative_to(source)} ({unreadable(error)})"
        return ""

    with warnings.catch_warnings(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of images that it reads nevertheless
        results = tqdm(pool.map(read, range(len(paths))), "read images", len(paths), unit="image", disable=None)
        try:
            failures = [failure for failure in results if failure]
        except BaseException:  # a stop signal must not wait for the remaining images
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise DataError(
            f"{len(failures)} of the {len(paths)} images in {source} cannot be read: {_few(failures)}; remove or "
            f"replace each of them"
        )
    return images


def square(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """An image that was just opened, as (size, size, 3) uint8: rotated according to its EXIF data, transparent parts on
    white, 16-bit grey as 8-bit. Raises ValueError for grey values without a known range, and Pillow's errors for a
    damaged image."""
    if image.mode in ("I", "F"):
        raise ValueError(f"grey values of mode {image.mode} have no known range")
    image.draft(None, (2 * size, 2 * size))  # decodes a large JPEG at a reduced size, which is many times as fast
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return np.array(ImageOps.fit(upright.convert("RGB"), (size, size)))


def unreadable(error: Exception) -> str:
    """The reason why Pillow could not open or decode an image, for a message."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
