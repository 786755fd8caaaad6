"""How a picture is read, for training and for a trained network alike: every kind of file, bounded memory."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import REPOSITORY, environment
from PIL import Image
from test_data_prep import run_here

from dist_train import data_prep
from dist_train.data_prep import pictures
from dist_train.data_prep.pictures import read_picture

Array = npt.NDArray[Any]


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def png(
    bits: int, colour: int, rows: list[bytes], width: int, clear: bytes, height: int = 0, pixels: bytes = b""
) -> io.BytesIO:
    """A PNG file with a transparent colour, which Pillow does not write for all bits. colour: PNG's number of the
    kind of pixels, 0 for grey and 2 for RGB. height, pixels: in place of rows, these compressed."""
    head = struct.pack(">IIBBBBB", width, height or len(rows), bits, colour, 0, 0, 0)
    pixels = pixels or zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = ((b"IHDR", head), *([(b"tRNS", clear)] if clear else []), (b"IDAT", pixels), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return io.BytesIO(b"".join([b"\x89PNG\r\n\x1a\n", *chunks]))


def grey(file: io.BytesIO, size: int, grey_bits: int | None = None) -> list[int]:
    """The first row of a grey picture."""
    pixels = read_picture(file, size, grey_bits)
    assert (pixels == pixels[..., :1]).all()
    row: list[int] = pixels[0, :, 0].tolist()
    return row


DEEP = np.tile(np.array([0, 1000, 40_000, 65_535], np.uint16), (4, 1))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (saved(Image.fromarray(DEEP), "PNG"), [0, 3, 156, 255]),
        (saved(Image.fromarray(DEEP), "PNG", transparency=1000), [0, 255, 156, 255]),
        (saved(Image.fromarray(DEEP), "TIFF"), [0, 3, 156, 255]),
        (saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), [255, 252, 99, 0]),  # white is zero
        (saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}, compression="tiff_lzw"), [255, 252, 99, 0]),
        (saved(Image.fromarray((DEEP >> 8).astype(np.uint8)), "TIFF", tiffinfo={262: 0}), [0, 3, 156, 255]),
        (io.BytesIO(b"P5 4 4 65535\n" + DEEP.astype(">u2").tobytes()), [0, 3, 156, 255]),
        (io.BytesIO(b"P5 4 4 1023\n" + (DEEP >> 6).astype(">u2").tobytes()), [0, 3, 156, 255]),
        (png(1, 0, [b"\x50"] * 4, 4, b"\0\0"), [255, 255, 255, 255]),
        (png(1, 0, [b"\x50"] * 4, 4, b"\0\1"), [0, 255, 0, 255]),
        (png(2, 0, [b"\x1b"] * 4, 4, b"\0\1"), [0, 255, 170, 255]),
        (png(4, 0, [b"\x05\xaf"] * 4, 4, b"\0\5"), [0, 255, 170, 255]),
        (png(8, 0, [b"\0\1\2\3"] * 4, 4, b"\0\1"), [0, 255, 2, 3]),
        (
            png(16, 2, [struct.pack(">12H", *np.repeat([0, 1, 40_000, 7 << 8], 3))] * 4, 4, b"\7\0" * 3),
            [0, 0, 156, 255],
        ),
    ],
)
def test_every_depth_and_transparency_is_read_and_as_a_pillow_image_too(file: io.BytesIO, expected: list[int]) -> None:
    assert grey(io.BytesIO(file.getvalue()), 4) == expected
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert read_picture(image, 4)[0, :, 0].tolist() == expected


def test_a_path_a_file_and_a_pillow_image_give_the_same_pixels(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 8
    for name in ("a.jpg", "b.webp", "c.png", "d.tif", "e.gif"):
        noise.save(tmp_path / name, exif=turned)
        path = tmp_path / name
        expected = read_picture(path, 32)
        with Image.open(path) as lazily, Image.open(path) as decoded:
            decoded.load()
            for source in (path.open("rb"), io.BytesIO(path.read_bytes()), lazily, decoded, str(path)):
                assert np.array_equal(read_picture(source, 32), expected), name
                if isinstance(source, io.BufferedReader):
                    source.close()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_fewer_bits_in_files_of_16_keep_their_levels(tmp_path: Path, bits: int) -> None:
    ramp = np.linspace(0, (1 << bits) - 1, 32 * 32).astype(np.uint16).reshape(32, 32)
    expected = (ramp >> (bits - 8)).astype(np.uint8)
    for label in "ab":
        (tmp_path / "in" / label).mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / "in" / label / "bright.png")
        Image.fromarray(ramp // 4).save(tmp_path / "in" / label / "dark.tif")
    done = run_here("--dataset", "deep", "--source", tmp_path / "in", "--image-size", 32, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    manifest = data_prep.check(tmp_path / "out")
    assert manifest.grey_bits == bits
    assert ("are read as" in done.stderr) == (bits < 16)
    for split in ("train", "test"):  # one scale for the whole data set, so that the dark ones stay dark
        for image in data_prep.read_split(tmp_path / "out", split)[0]:
            assert any(np.array_equal(image[..., 0], each) for each in (expected, expected // 4))
    assert np.array_equal(read_picture(tmp_path / "in" / "a" / "bright.png", 32, bits)[..., 0], expected)
    if bits < 16:
        with pytest.raises(ValueError, match=f"grey values up to 65,535, more than the {bits} bits of the training"):
            read_picture(saved(Image.fromarray(DEEP), "PNG"), 4, bits)
    if bits != 14:  # a single picture with 14 bits is not told from a dark one
        assert np.array_equal(read_picture(tmp_path / "in" / "a" / "bright.png", 32)[..., 0], expected)


def test_a_copy_of_the_file_alone_reads_pictures(tmp_path: Path) -> None:
    (tmp_path / "pictures.py").write_bytes(Path(pictures.__file__).read_bytes())
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    code = "from pictures import read_picture; print(read_picture('deep.png', 4)[0, :, 0].tolist())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 3, 156, 255]\n", "")


# --- what must not happen -----------------------------------------------------------------------------------


def test_other_formats_and_files_that_are_not_regular_are_refused(tmp_path: Path) -> None:
    eps = tmp_path / "drawing.png"  # Pillow would start Ghostscript
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\n")
    with pytest.raises(Exception, match="cannot identify") as caught:
        read_picture(eps, 4)
    assert pictures.unreadable(caught.value) == "not an image"
    os.mkfifo(tmp_path / "pipe.png")  # nobody writes: opening it would never return
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file") as refused:
            read_picture(path, 4)
        assert pictures.unreadable(refused.value) == "not a regular file"
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*pictures.FORMATS, "MPO")}
    assert known - {".pfm"} <= {*pictures.SUFFIXES}  # .pfm has grey values without a known range


MEMORY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dist_train.data_prep.pictures import read_picture
with ThreadPoolExecutor(2) as pool:
    for pixels in pool.map(lambda path: read_picture(path, 32), sys.argv[1:] * 2):
        assert pixels.min() == pixels.max() == 200
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_large_pictures_are_read_one_at_a_time_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    rows = zlib.compressobj(1)
    content = b"".join(rows.compress(b"\0" + b"\xc8" * 13_000) for _ in range(13_000)) + rows.flush()
    path.write_bytes(png(8, 0, [], 13_000, b"", height=13_000, pixels=content).getvalue())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, path],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400_000  # KiB; one such picture is 169 MB decoded
    with pytest.raises(Image.DecompressionBombError) as caught:
        read_picture(png(1, 0, [], 20_000, b"\0\0", height=10_000), 32)
    assert pictures.unreadable(caught.value) == "Image size (200000000 pixels) exceeds limit of 178956970 pixels"
    monkeypatch.setattr(pictures, "LARGEST", 400)
    assert read_picture(saved(Image.new("RGB", (20, 20)), "PNG"), 4).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="20x20 pixels, where 100 are the most that can be read"):
        read_picture(saved(Image.new("RGB", (20, 20)), "WEBP"), 4)
