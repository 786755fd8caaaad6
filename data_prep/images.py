"""A folder of images of any size and kind, in torchvision's ImageFolder layout, as square uint8 RGB images."""

import hashlib
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dist_train.data_prep.datasets import Pixels
from dist_train.data_prep.files import DataError

TEST_FRACTION = 0.2  # of each class, where the folder has no test part

# torchvision's IMG_EXTENSIONS, which takes seconds to import
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Files = dict[str, list[Path]]  # those of each class, by its name


def load_images(source: Path, size: int, test_fraction: float | None = None) -> Pixels:
    """Load the images in `source`/train/CLASS and `source`/test/CLASS (or val), or else those in `source`/CLASS, of
    which a share of each class becomes the test split.

    Each becomes size x size pixels: its shorter side is scaled, and the middle of the longer one kept. Images come in
    the order of the SHA-256 of their path in `source`, and the first of a class are its test images: classes are mixed,
    and images that are added later move hardly any other between the splits. test_fraction: the share, TEST_FRACTION
    unless given. Raises DataError.
    """
    if not source.is_dir():
        raise DataError(f"--source {source} is no folder: give one with a folder of images for each class")
    others: list[Path] = []
    test = next((source / name for name in ("test", "val") if (source / name).is_dir()), None)
    if test is not None and (source / "train").is_dir():
        if test_fraction is not None:
            raise DataError(
                f"--test-fraction {test_fraction} is not for {source}, which has a test part of its own: leave it out"
            )
        files = {"train": _files(source / "train", others), "test": _files(test, others)}
        if unknown := [name for name in files["test"] if name not in files["train"]]:
            raise DataError(
                f"{test} has classes that {source / 'train'} has not, {_some(unknown)}: put images of the same classes "
                f"into both"
            )
        if not files["test"]:
            raise DataError(f"{test} has no folders of classes: give it the same classes as {source / 'train'}")
    else:
        files = _divided(_files(source, others), source, test_fraction or TEST_FRACTION)
    classes = tuple(files["train"])
    if len(classes) < 2:
        raise DataError(
            f"{source} holds {f'one class, {classes[0]}' if classes else 'no classes'}: give a folder with a folder of "
            f"images for each class, two at least, or with two such folders train and test"
        )
    print(f"data_prep: {source} has {len(classes)} classes: {_some([*classes])}", file=sys.stderr)
    if others:
        names = _some([str(path.relative_to(source)) for path in others])
        print(f"data_prep: left out, as they are no images by their names: {names}", file=sys.stderr, flush=True)

    samples = {
        split: sorted(
            ((path, label) for label, name in enumerate(classes) for path in of_class.get(name, [])),
            key=lambda sample: _place(sample[0], source),
        )
        for split, of_class in files.items()
    }
    count = len(samples["train"])
    images = _read([path for split in samples.values() for path, _ in split], source, size)
    labels = np.array([label for split in samples.values() for _, label in split], np.int64)
    return Pixels(classes, {"train": (images[:count], labels[:count]), "test": (images[count:], labels[count:])})


def _files(folder: Path, others: list[Path]) -> Files:
    """The images of each class below `folder`. Files that are no images by their names are added to `others`, hidden
    files and folders are passed over. Raises DataError for a class without images."""
    files: Files = {}
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    for of_class in classes:
        files[of_class.name] = []
        for path in sorted(of_class.rglob("*")):
            if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                (files[of_class.name] if path.suffix.lower() in SUFFIXES else others).append(path)
    if empty := [name for name, found in files.items() if not found]:
        raise DataError(
            f"{folder} has no images for {_some(empty)}: put files there ({', '.join(SUFFIXES)}), or remove the folder"
        )
    return files


def _divided(files: Files, source: Path, test_fraction: float) -> dict[str, Files]:
    if single := [name for name, found in files.items() if len(found) == 1]:
        raise DataError(
            f"{source} has a single image for {_some(single)}, too few for a train and a test split: add images, or "
            f"remove the folder"
        )
    train, test = {}, {}
    for name, found in files.items():
        found = sorted(found, key=lambda path: _place(path, source))
        count = min(max(round(test_fraction * len(found)), 1), len(found) - 1)
        test[name], train[name] = found[:count], found[count:]
    return {"train": train, "test": test}


def _place(path: Path, source: Path) -> bytes:
    return hashlib.sha256(os.fsencode(path.relative_to(source).as_posix())).digest()


def _some(names: list[str]) -> str:
    """The first few names, and how many there are besides."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _read(paths: list[Path], source: Path, size: int) -> npt.NDArray[np.uint8]:
    """The images as (N, size, size, 3). Raises DataError if any cannot be read."""
    from tqdm import tqdm

    try:
        images = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError:
        gigabytes = len(paths) * size * size * 3 / 1e9
        raise DataError(
            f"--image-size {size} makes {gigabytes:,.0f} GB of {len(paths)} images, more than the memory: use a "
            f"smaller one"
        ) from None

    def read(place: int) -> str:
        """Returns what is wrong with the image."""
        try:
            with Image.open(paths[place]) as image:
                images[place] = square(image, size)
        except Exception as error:  # Pillow's decoders raise all sorts, also SyntaxError
            return f"{paths[place].relative_to(source)} ({unreadable(error)})"
        return ""

    with warnings.catch_warnings(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of images that it reads all the same
        done = tqdm(pool.map(read, range(len(paths))), "read images", len(paths), unit="image", disable=None)
        try:
            wrong = [said for said in done if said]
        except BaseException:  # a stop signal need not wait for the images that are left
            pool.shutdown(cancel_futures=True)
            raise
    if wrong:
        raise DataError(
            f"{len(wrong)} of the {len(paths)} images in {source} cannot be read: {_some(wrong)}; remove or replace "
            f"each of them"
        )
    return images


def square(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """An image that was just opened, as (size, size, 3): turned as its EXIF says, transparent parts white, 16 bits of
    grey as 8. Raises what Pillow does for a damaged one."""
    if image.mode in ("I", "F"):
        raise ValueError(f"grey values of mode {image.mode} have no known range")
    image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded only as finely as needed, many times as fast
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
    return np.array(ImageOps.fit(turned.convert("RGB"), (size, size)))


def unreadable(error: Exception) -> str:
    """Why Pillow could not open or decode an image, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
