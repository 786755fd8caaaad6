"""Loads a folder of images of any size and format, in torchvision's ImageFolder layout, as square uint8 RGB images."""

import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_train.data_prep.datasets import Pixels
from dist_train.data_prep.files import DataError
from dist_train.data_prep.folders import few, scan, sort_key
from dist_train.data_prep.pictures import bits_of, read_with_range, unreadable

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
    print(f"data_prep: {source} has {len(classes)} classes: {few([*classes])}", file=sys.stderr)
    for left_out in found.left_out:
        print(f"data_prep: left out {left_out}", file=sys.stderr, flush=True)

    samples = {
        split: sorted(
            ((path, label) for label, name in enumerate(classes) for path in by_class.get(name, [])),
            key=lambda sample: sort_key(sample[0], source),
        )
        for split, by_class in found.splits.items()
    }
    count = len(samples["train"])
    images, grey_bits = _read([path for split in samples.values() for path, _ in split], source, size)
    labels = np.array([label for split in samples.values() for _, label in split], np.int64)
    splits = {"train": (images[:count], labels[:count]), "test": (images[count:], labels[count:])}
    names = {split: [path.relative_to(source).as_posix() for path, _ in of] for split, of in samples.items()}
    return Pixels(classes, splits, grey_bits, found.left_out, names)


def _read(paths: list[Path], source: Path, size: int) -> tuple[npt.NDArray[np.uint8], int | None]:
    """The images as (N, size, size, 3) uint8, and the bits of grey in those of 16 bits, None where there are none.
    Raises DataError if any cannot be read, or memory is too small."""
    from tqdm import tqdm

    try:
        images = np.empty((len(paths), size, size, 3), np.uint8)
    except MemoryError:
        gigabytes = len(paths) * size * size * 3 / 1e9
        raise DataError(
            f"--image-size {size} makes {gigabytes:,.0f} GB of {len(paths)} images, more than fits in memory: use a "
            f"smaller one"
        ) from None

    largest = np.zeros(len(paths), np.int64)  # of the grey values of 16 bits
    failures: list[str] = []

    def read(index: int, grey_bits: int) -> str:
        """Read one image. Returns "", or its path and why it cannot be read."""
        try:
            images[index], largest[index] = read_with_range(paths[index], size, grey_bits)
        except Exception as error:  # Pillow's decoders raise errors of all types, also SyntaxError
            return f"{paths[index].relative_to(source)} ({unreadable(error)})"
        return ""

    with warnings.catch_warnings(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of images that it reads nevertheless
        try:
            results = pool.map(partial(read, grey_bits=16), range(len(paths)))
            progress = tqdm(results, "read images", len(paths), unit="image", disable=None)
            failures += filter(None, progress)
            deep = np.flatnonzero(largest)
            grey_bits = bits_of(int(largest.max()), _DEPTHS) if len(deep) else None
            if grey_bits is not None and grey_bits < 16:
                failures += filter(None, pool.map(partial(read, grey_bits=grey_bits), deep.tolist()))
        except BaseException:  # a stop signal must not wait for the remaining images
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise DataError(
            f"{len(failures)} of the {len(paths)} images in {source} cannot be read: {few(failures)}; remove or "
            f"replace each of them"
        )
    if grey_bits is not None and grey_bits < 16:
        print(
            f"data_prep: the {len(deep)} images with 16 bits of grey have values up to {largest.max():,}: they are "
            f"read as {grey_bits} bits",
            file=sys.stderr,
            flush=True,
        )
    return images, grey_bits
