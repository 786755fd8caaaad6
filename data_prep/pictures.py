"""How dist_train reads a picture, for training and for a trained network alike: as an RGB square of 8 bits.

This file needs only numpy and Pillow. `dist-train export` puts a copy of it beside the exported files, so that they are
given the pixels that the network was trained on.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

# Pillow's names of the formats that are read; it recognises them by their content, and has no AVIF before 11.3. Of the
# others some start a program (EPS) or are recognised in any file.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (
    *(".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg"),
    *(".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
LARGEST = 178_956_970  # pixels of a picture, and of all that are decoded at a time: 0.7 GB; Pillow reads no larger ones
_COPIES = {"AVIF": 4, "JPEG2000": 4, "WEBP": 4}  # how many times the decoded picture is in memory, where not once
_REDUCED = 1 << 24  # pixels above which a picture is averaged over blocks of pixels before it is scaled
_BAND = 1 << 20  # pixels that are converted at a time
_DEPTHS = (8, 10, 12)  # bits of grey values that are found in files of 16 bits; such a picture would be nearly black
_GREY = ("I;16", "I;16B", "I;16L", "I;16N")  # modes of 16 bits of grey
_PHOTOMETRIC, _BITS, _ORIENTATION = 262, 258, 274  # tags of TIFF and EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what undoes each orientation of EXIF

Source = str | os.PathLike[str] | BinaryIO | Image.Image
Pixels = npt.NDArray[np.uint8]


def read_picture(source: Source, size: int, grey_bits: int | None = None) -> Pixels:
    """A picture as (size, size, 3) uint8 RGB: turned as its EXIF data says, transparent parts on white, its shorter
    side scaled to `size`, and the middle of the longer one kept; of an animation the first frame.

    source: a regular file's path, a file opened for reading bytes, or a Pillow image, which gives the same pixels.
    grey_bits: the bits of the grey values in pictures of 16 bits; None where that is not known: 16, or fewer for a
    picture that would be nearly black. Raises ValueError for grey values without a known range or of more bits, OSError
    for a file that is no regular one, and Pillow's errors for one that is damaged or of another format.
    """
    return read_with_range(source, size, grey_bits)[0]


def read_with_range(source: Source, size: int, grey_bits: int | None = None) -> tuple[Pixels, int]:
    """As `read_picture`, and the largest of its grey values of 16 bits; 0 for any other picture."""
    if isinstance(source, Image.Image):
        with _memory.taken(source):
            return _square(source, size, grey_bits)
    with closing(_opened(source)) as image, _memory.taken(image):
        return _square(image, size, grey_bits)


def bits_of(largest: int, depths: tuple[int, ...] = _DEPTHS) -> int:
    """The bits of the grey values in pictures of 16 bits, from the largest: one of `depths`, or else 16."""
    return next((bits for bits in depths if largest < 1 << bits), 16)


def unreadable(error: Exception) -> str:
    """The reason why a picture could not be read, for a message."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error).partition(", could be")[0] or type(error).__name__


def _opened(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    if isinstance(source, str | os.PathLike) and not stat.S_ISREG(Path(source).stat().st_mode):
        raise OSError(0, "not a regular file")  # opening a pipe would wait for another process
    Image.init()
    return Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])


class _Memory:
    """The pixels that may still be decoded, by all threads."""

    def __init__(self) -> None:
        self._free, self._changed = LARGEST, threading.Condition()

    @contextmanager
    def taken(self, image: Image.Image) -> Iterator[None]:
        """A context in which an image that was opened may be decoded. Raises ValueError for one that is too large."""
        width, height = image.size
        copies = _COPIES.get(image.format or "", 1)
        if width * height * copies > LARGEST:
            raise ValueError(f"{width}x{height} pixels, where {LARGEST // copies:,} are the most that can be read")
        with self._changed:
            self._changed.wait_for(lambda: self._free >= width * height * copies)
            self._free -= width * height * copies
        try:
            yield
        finally:
            with self._changed:
                self._free += width * height * copies
                self._changed.notify_all()


_memory = _Memory()


def _square(image: Image.Image, size: int, grey_bits: int | None) -> tuple[Pixels, int]:
    """The square, and the largest grey value of 16 bits."""
    clear = _transparent_colour(image)
    image.load()
    width, height = image.size
    bits, largest = 0, 0
    if image.mode in _GREY or (image.mode == "I" and image.format in ("PNG", "PPM")):
        largest = max(int(np.max(np.asarray(band), initial=0)) for band in _bands(image, _BAND // width))
        bits = bits_of(largest) if grey_bits is None else grey_bits
        if _tiff_tag(image, _BITS) == (12,):  # in all other files 12 bits are not told from 16
            bits, largest = 12, 0
        if largest >= 1 << bits:
            raise ValueError(f"grey values up to {largest:,}, more than the {bits} bits of the training images")
    elif image.mode.startswith(("I", "F")):
        raise ValueError(f"grey values of mode {image.mode} have no known range")
    factor = max(1, min(width, height) // (4 * size)) if width * height > _REDUCED else 1
    rgb = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = max(1, _BAND // width // factor) * factor
    for number, band in enumerate(_bands(image, rows)):
        part = _rgb(band, clear, bits, inverted=bits > 0 and _tiff_tag(image, _PHOTOMETRIC) == 0)
        rgb.paste(part.reduce(factor) if factor > 1 else part, (0, number * rows // factor))
    fitted = ImageOps.fit(rgb, (size, size))
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    return np.array(fitted if turn is None else fitted.transpose(turn)), largest


def _bands(image: Image.Image, rows: int) -> Iterator[Image.Image]:
    """The image in bands of at most `rows` rows, from the top: what is converted at a time takes little memory."""
    width, height = image.size
    rows = max(1, rows)
    return (image.crop((0, top, width, min(top + rows, height))) for top in range(0, height, rows))


def _rgb(band: Image.Image, clear: tuple[int, ...] | None, bits: int, inverted: bool) -> Image.Image:
    """A part of a picture as RGB on white. clear: the colour that is transparent. bits: of the grey values, 0 for other
    pictures. inverted: whether the grey value 0 is white."""
    if bits:
        values = np.asarray(band).astype(np.uint16)
        grey = (values >> (bits - 8)).astype(np.uint8)
        if inverted:
            grey = 255 - grey
        if clear:
            grey[values == clear[0]] = 255
        return Image.fromarray(grey).convert("RGB")
    if clear:
        pixels = np.array(band.convert("RGB"))
        pixels[(pixels == clear).all(2)] = 255
        return Image.fromarray(pixels)
    if band.has_transparency_data:
        rgba = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return band.convert("RGB")


def _transparent_colour(image: Image.Image) -> tuple[int, ...] | None:
    """The colour of a picture without a palette that is transparent, as its pixels are after decoding; None for none.

    In PNG it has the file's bits, where Pillow decodes grey of 1 to 4 bits and RGB of 16 to 8 bits."""
    clear = image.info.get("transparency")
    if not isinstance(clear, int | tuple) or image.mode not in ("1", "L", "RGB", "I", *_GREY):
        return None
    colour = clear if isinstance(clear, tuple) else (clear,)
    tile = getattr(image, "tile", None) if image.format == "PNG" else None
    stored = re.search(r";(\d+)", str(tile[0][3])) if tile else None  # Pillow forgets it when it has decoded the file
    bits = 1 if image.mode == "1" else int(stored[1]) if stored else 16 if max(colour) > 255 else 8
    if image.mode == "RGB":
        return tuple(value >> (bits - 8) for value in colour)
    if bits < 8 and max(colour) < 1 << bits:
        colour = tuple(value * 255 // ((1 << bits) - 1) for value in colour)
    return colour if bits == 16 else colour * 3


def _tiff_tag(image: Image.Image, tag: int) -> object:
    """The value of a tag, 0 for none in a TIFF file; None for other files."""
    return image.tag_v2.get(tag, 0) if isinstance(image, TiffImageFile) else None
