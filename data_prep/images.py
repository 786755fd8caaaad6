"""Loads a folder of images of any size and format, in torchvision's ImageFolder layout, as square uint8 RGB images."""

import base64
import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_train.data_prep.datasets import Pixels
from dist_train.data_prep.files import DataError
from dist_train.data_prep.folders import few, labelled, scan, sort_key
from dist_train.data_prep.pictures import bits_of, read_with_range, unreadable
from dist_train.errors import say

# bits of grey values that are found in pictures of 16 bits: of a whole data set, 14 bits are told from dark pictures
_DEPTHS = (8, 10, 12, 14)


def load_images(source: Path, size: int, test_fraction: float | None = None) -> Pixels:
    """Load the images in a folder, which `folders.scan` finds.

    Each becomes size x size pixels: its shorter side is scaled, and the middle of the longer one kept. Images are in
    the order of the SHA-256 of their path in `source`, and the first ones of a class are its test images: so classes
    are mixed, and images that are added later move few others between the splits. test_fraction: the share of each
    class, TEST_FRACTION unless given. Raises DataError.
    """
    found = scan(source, test_fraction)
    classes = tuple(found.splits["train"])
    say(f"{source} has {len(classes)} classes: {few([*classes])}", "data_prep")
    for part in found.skipped:
        say(f"skipped {part}", "data_prep")

    samples = {
        split: sorted(
            ((path, label) for label, name in enumerate(classes) for path in by_class.get(name, [])),
            key=lambda sample: sort_key(sample[0], source),
        )
        for split, by_class in found.splits.items()
    }
    count = len(samples["train"])
    images, grey_bits = _read_all([path for split in samples.values() for path, _ in split], source, size)
    labels = np.array([label for split in samples.values() for _, label in split], np.int64)
    splits = {"train": (images[:count], labels[:count]), "test": (images[count:], labels[count:])}
    names = {split: [path.relative_to(source).as_posix() for path, _ in of] for split, of in samples.items()}
    return Pixels(classes, splits, grey_bits, found.skipped, names)


def load_labelled(
    source: Path, split: str, classes: tuple[str, ...], size: int, grey_bits: int | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The images of `classes` in a folder that `folders.labelled` reads: uint8 (N, size, size, 3), and their labels,
    int64 (N,). grey_bits: as in `pictures.read_picture`. Raises DataError, also for a class that is none of them."""
    files, skipped = labelled(source, split)
    if unknown := [name for name in files if name not in classes]:
        raise DataError(
            f"{source} has classes that the network does not have, {few(unknown)}: name a folder with folders of "
            f"images for {few([*classes])}"
        )
    for part in skipped:
        _say(f"skipped {part}")
    samples = [(path, classes.index(name)) for name, paths in files.items() for path in paths]
    images, _ = _read([path for path, _ in samples], source, size, grey_bits)
    return images, np.array([label for _, label in samples], np.int64)


def as_png(pixels: npt.NDArray[np.uint8], side: int | None = None) -> str:
    """An (H, W, 3) image as PNG in base64. side: pixels that it has at most, to which a larger one is scaled down."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if side is not None:
        image.thumbnail((side, side))
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _read_all(paths: list[Path], source: Path, size: int) -> tuple[npt.NDArray[np.uint8], int | None]:
    """The images as (N, size, size, 3) uint8, and the bits of grey in those of 16 bits, None where there are none.
    Raises DataError."""
    images, largest = _read(paths, source, size, 16)
    deep = np.flatnonzero(largest)
    if not len(deep):
        return images, None
    grey_bits = bits_of(int(largest.max()), _DEPTHS)
    if grey_bits < 16:
        _say(
            f"the {len(deep)} images with 16 bits of grey have values up to {largest.max():,}: they are read as "
            f"{grey_bits} bits"
        )
        images[deep], _ = _read([paths[index] for index in deep], source, size, grey_bits)
    return images, grey_bits


def _read(
    paths: list[Path], source: Path, size: int, grey_bits: int | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The images as (N, size, size, 3) uint8, and the largest grey value of each that has 16 bits, 0 of others. Raises
    DataError if any cannot be read, or memory is too small."""
    from tqdm import tqdm

    try:
        images = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError:
        gigabytes = len(paths) * size * size * 3 / 1e9
        raise DataError(
            f"--image-size {size} makes {gigabytes:,.0f} GB of {len(paths)} images, more than fits in memory: use a "
            f"smaller one"
        ) from None
    largest = np.zeros(len(paths), np.int64)

    def read(index: int) -> str:
        """Read one image. Returns "", or its path and why it cannot be read."""
        try:
            images[index], largest[index] = read_with_range(paths[index], size, grey_bits)
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
            f"{len(failures)} of the {len(paths)} images in {source} cannot be read: {few(failures)}; remove or "
            f"replace each of them"
        )
    return images, largest


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # every rank reads what it evaluates on
        say(message, "data_prep")
