"""The .beton file format of ffcv (Leclerc et al. 2023, "FFCV: Accelerating Training by Removing Data Bottlenecks"),
version 2, for data sets of images: each sample is one raw RGB image, all of one size, and one integer label.

All numbers are little-endian. A file is, from its start:

- the header, 24 bytes (HEADER);
- a description of each field, 1,041 bytes (FIELD): type 2, "image", and type 1, "label". For these types ffcv leaves
  the arguments zero;
- the table of samples, 24 bytes each (SAMPLE), in the order of the data set. mode is 1 for raw pixels (0 is JPEG);
  pointer is the offset of the image in the file, H*W*3 bytes in the order height, width, channel;
- zeros up to a multiple of the page size, a power of two from 2 MiB to 2 GiB;
- whole pages of images, one after another. An image lies in one page: where the next does not fit, zeros fill the page;
- the table of allocations, 24 bytes each (ALLOCATION), to the end of the file; ffcv's reader reads the images' sizes in
  bytes from it.

For the same samples write() gives the bytes that ffcv's DatasetWriter gives with one worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

VERSION = 2
LARGEST_IMAGE = 1 << 31  # bytes: the largest page, a power of two whose size fits the header's 32 bits
_SMALLEST_PAGE = 1 << 21  # bytes
_AHEAD = 2  # batches that are read ahead

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "pointer", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],  # the image's 13 bytes are packed, the label is aligned
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("bytes", "<u8")])

_FIELDS = np.array([(2, b"image", b""), (1, b"label", b"")], FIELD)
_TABLE = HEADER.itemsize + _FIELDS.nbytes  # offset of the table of samples
_RAW = 1  # mode of raw pixels

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def page_size(image_bytes: int) -> int:
    """The page size in bytes for images of `image_bytes` bytes: the smallest possible, since a file is padded to whole
    pages."""
    return max(_SMALLEST_PAGE, 1 << (image_bytes - 1).bit_length())


def write(path: Path, images: Images, labels: Labels) -> None:
    """Write images, uint8 (N, H, W, 3) with N > 0, and labels, int64 (N,), as a new file. Raises OSError; ValueError
    for images that the format cannot hold."""
    from tqdm import tqdm

    count, height, width, channels = images.shape
    size = height * width * channels
    if channels != 3 or not 0 < size <= LARGEST_IMAGE or max(height, width) >= 1 << 16 or labels.shape != (count,):
        raise ValueError(f"a beton file cannot hold images of {images.shape} with labels of {labels.shape}")
    page = page_size(size)
    per_page = page // size
    first_page = -(-(_TABLE + count * SAMPLE.itemsize) // page) * page
    pages = -(-count // per_page)
    numbers = np.arange(count)
    table = np.zeros(count, SAMPLE)
    table["mode"], table["width"], table["height"], table["label"] = _RAW, width, height, labels
    table["pointer"] = first_page + numbers // per_page * page + numbers % per_page * size
    allocations = np.zeros(count, ALLOCATION)
    allocations["sample"], allocations["pointer"], allocations["bytes"] = numbers, table["pointer"], size
    header = np.array((VERSION, len(_FIELDS), page, count, first_page + pages * page), HEADER)
    with path.open("wb") as file, tqdm(desc=f"write {path.name}", total=count, unit="image", disable=None) as bar:
        for part in (header, _FIELDS, table):
            file.write(part.tobytes())
        file.write(bytes(first_page - file.tell()))
        for first in range(0, count, per_page):
            batch = np.ascontiguousarray(images[first : first + per_page])
            file.write(batch.data)
            file.write(bytes(page - batch.nbytes))
            bar.update(len(batch))
        file.write(allocations.tobytes())


class BetonFile:
    """A beton file that is open for reading, as a memory map; it must not be truncated while it is open.

    shape: (H, W, 3) of every image. labels: (N,) int64.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError; ValueError for a file that is damaged or of another kind. All offsets in it are checked, so
        that neither this reader nor ffcv's, which checks nothing, reads outside of it."""
        damaged = ValueError("it is not a complete beton file")
        total = path.stat().st_size
        if total < _TABLE:
            raise damaged
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        header = content[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION:
            raise ValueError(f"it has version {header['version']} of the beton format where {VERSION} can be read")
        count, page, end = (int(header[name]) for name in ("samples", "page_size", "allocations"))
        first = _TABLE + count * SAMPLE.itemsize  # the lowest offset that an image may have
        if header["fields"] != len(_FIELDS) or content[HEADER.itemsize : _TABLE].tobytes() != _FIELDS.tobytes():
            raise ValueError("it does not hold images with a label each")
        if (
            not count
            or page < _SMALLEST_PAGE
            or page & (page - 1)
            or first > end
            or end + count * ALLOCATION.itemsize != total
        ):
            raise damaged
        table = content[_TABLE:first].view(SAMPLE)
        allocations = content[end:].view(ALLOCATION)
        height, width = int(table["height"][0]), int(table["width"][0])
        size = height * width * 3
        pointers = table["pointer"]
        if not np.all((table["height"] == height) & (table["width"] == width) & (table["mode"] == _RAW)):
            raise ValueError("it does not hold raw images of one size")
        if not (
            0 < size <= end - first
            and first <= int(pointers.min())
            and int(pointers.max()) <= end - size
            and np.all(allocations["bytes"] == size)
            and np.array_equal(np.sort(allocations["pointer"]), np.sort(pointers))
        ):
            raise damaged
        self.path, self.shape = path, (height, width, 3)
        self.labels: Labels = table["label"].astype(np.int64)
        self._pointers = pointers.astype(np.int64)
        self._windows = sliding_window_view(content, size)  # row i: the image at offset i

    def images(self, indices: NDArray[np.int64] | None = None) -> Images:
        """A copy of the images at `indices`, (n,) int64, or of all: (n, H, W, 3) uint8. Raises IndexError."""
        pointers = self._pointers if indices is None else self._pointers[indices]
        return self._windows[pointers].reshape(-1, *self.shape)

    def batches(self, indices: NDArray[np.int64], size: int) -> Generator[Images, None, None]:
        """Batches of the images at `indices`: (size, H, W, 3) uint8. A thread reads ahead until the iterator ends."""
        parts = (indices[first : first + size] for first in range(0, len(indices), size))
        reader = ThreadPoolExecutor(1, "beton")
        try:
            ahead = deque(reader.submit(self.images, part) for part in islice(parts, _AHEAD))
            while ahead:
                images = ahead.popleft().result()
                ahead.extend(reader.submit(self.images, part) for part in islice(parts, 1))
                yield images
        finally:
            reader.shutdown(cancel_futures=True)
