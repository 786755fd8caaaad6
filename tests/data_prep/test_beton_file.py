"""The beton format: what our code and ffcv's write for each other, and what is refused."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needs_ffcv
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_train.data_prep import ffcv_library
from dist_train.data_prep.beton_file import ALLOCATION, FIELD, HEADER, SAMPLE, BetonFile, Images, Labels, write

PAGE = 1 << 21
# of the file of the fixed samples below, as ffcv 1.0.2 wrote it
KNOWN = "7d2adbfbf86c392beacf2fc9b2177f1051b9842dcc313220bdaf67edf421586e"
TABLE = HEADER.itemsize + 2 * FIELD.itemsize


def samples(count: int, height: int, width: int) -> tuple[Images, Labels]:
    """Images and labels that differ among each other, by a generator of their own."""
    random = np.random.default_rng([count, height, width])
    images = random.integers(0, 256, (count, height, width, 3), np.uint8)
    return images, random.integers(-(2**63), 2**63 - 1, count)


def same(file: BetonFile, images: Images, labels: Labels) -> bool:
    return (
        file.shape == images.shape[1:]
        and np.array_equal(file.images(), images)
        and np.array_equal(file.labels, labels)
        and file.labels.dtype == np.int64
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70))
def test_what_was_written_is_read(count: int, height: int, width: int) -> None:
    images, labels = samples(count, height, width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.beton"
        write(path, images, labels)
        file = BetonFile(path)
        assert same(file, images, labels)
        chosen = np.random.default_rng(0).integers(0, count, 2 * count)
        assert np.array_equal(file.images(chosen), images[chosen])
        content = path.read_bytes()
    for image in images[:: max(count // 3, 1)]:
        assert image.tobytes() in content


# (images, height, width): just one fits in a page; one is a little too large for the smallest page; just two fit; the
# table of samples, the images and the table of allocations are each longer than a page
CASES = [(3, 1025, 682), (3, 837, 836), (5, 1025, 341), (175_000, 2, 2), (1, 1, 1), (683, 32, 32), (20, 31, 57)]


@needs_ffcv
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ffcv_writes_the_same_bytes_and_reads_ours(case: tuple[int, int, int], tmp_path: Path) -> None:
    images, labels = samples(*case)
    ours, theirs = tmp_path / "ours.beton", tmp_path / "theirs.beton"
    write(ours, images, labels)
    assert ffcv_library.version()
    ffcv_library.write(theirs, images, labels)
    assert ours.read_bytes() == theirs.read_bytes()
    assert same(BetonFile(theirs), images, labels)

    from ffcv.reader import Reader

    reader = Reader(str(ours))
    assert reader.field_names == ["image", "label"]
    assert np.array_equal(reader.metadata["f1"].ravel(), labels)
    order = np.random.default_rng(0).permutation(len(images))[:1000]
    batches = ffcv_library.Stream(ours, images.shape[1:]).batches(order, 400)
    assert np.array_equal(np.concatenate([some.copy() for some in batches]), images[order])


@needs_ffcv
def test_ffcvs_own_decoders_read_ours(tmp_path: Path) -> None:
    """The whole of ffcv as its users call it, labels included."""
    images, labels = samples(50, 9, 14)
    write(tmp_path / "ours.beton", images, labels)
    assert ffcv_library.version()
    from ffcv.loader import Loader, OrderOption

    loader = Loader(str(tmp_path / "ours.beton"), 20, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
    found = [[part.numpy().copy() for part in batch] for batch in loader]
    assert np.array_equal(np.concatenate([image for image, _ in found]), images)
    assert np.array_equal(np.concatenate([label for _, label in found]).ravel(), labels)


@needs_ffcv
def test_a_file_of_ffcvs_parallel_writer_is_read(tmp_path: Path) -> None:
    """Its workers take pages in any order."""
    assert ffcv_library.version()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images, labels = samples(300, 120, 130)  # 8 pages
    path = tmp_path / "theirs.beton"
    writer = DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()}, page_size=PAGE, num_workers=2)
    writer.from_indexed_dataset(list(zip(images, labels.tolist(), strict=True)), chunksize=5)
    assert same(BetonFile(path), images, labels)


def test_the_bytes_are_those_that_ffcv_1_0_2_wrote(tmp_path: Path) -> None:
    images = (np.arange(700 * 32 * 32 * 3) * 7 % 251).astype(np.uint8).reshape(700, 32, 32, 3)  # two pages
    write(tmp_path / "some.beton", images, np.arange(700) * 3 - 5)
    assert hashlib.sha256((tmp_path / "some.beton").read_bytes()).hexdigest() == KNOWN


def test_what_the_format_has_no_room_for_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "some.beton"
    for shape in ((2, 4, 4, 1), (2, 1, 70_000, 3), (2, 0, 4, 3)):
        with pytest.raises(ValueError, match="cannot hold"):
            write(path, np.zeros(shape, np.uint8), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="cannot hold"):
        write(path, np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))
    assert not path.exists()


# --- damaged files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beton") / "whole.beton"
    write(path, *samples(700, 32, 32))
    return path


def field(content: NDArray[np.uint8], part: str, name: str) -> NDArray[Any]:
    """A column of the header or of a table, to be written to."""
    end = int(content[:24].view(HEADER)["allocations"][0])
    parts = {
        "header": content[:24].view(HEADER),
        "fields": content[24:TABLE].view(FIELD),
        "table": content[TABLE : TABLE + 700 * 24].view(SAMPLE),
        "allocations": content[end:].view(ALLOCATION),
    }
    found: NDArray[Any] = parts[part][name]
    return found


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("header", "version", 3, "version 3 of the beton format where 2 can be read"),
        ("header", "fields", 3, "images with a label each"),
        ("header", "page_size", 0, "not a complete"),
        ("header", "page_size", PAGE + 1, "not a complete"),
        ("header", "samples", 699, "not a complete"),
        ("header", "samples", 2**64 - 1, "not a complete"),
        ("header", "samples", 0, "not a complete"),
        ("header", "allocations", 0, "not a complete"),
        ("header", "allocations", 2**63 + 24, "not a complete"),
        ("fields", "type", 0, "images with a label each"),
        ("fields", "name", b"picture", "images with a label each"),
        ("table", "mode", 0, "raw images of one size"),
        ("table", "height", 31, "raw images of one size"),
        ("table", "width", 65_535, "raw images of one size"),
        ("table", "pointer", 100, "not a complete"),
        ("table", "pointer", 2**64 - 3072, "not a complete"),
        ("table", "pointer", 3 * PAGE - 3071, "not a complete"),
        ("allocations", "bytes", 3071, "not a complete"),
        ("allocations", "bytes", 2**64 - 1, "not a complete"),
        ("allocations", "pointer", PAGE + 1, "not a complete"),
    ],
)
def test_inconsistent_numbers_are_refused(
    whole: Path, tmp_path: Path, part: str, name: str, value: Any, words: str
) -> None:
    content = np.fromfile(whole, np.uint8)
    field(content, part, name)[0 if part == "header" else 1] = value
    content.tofile(tmp_path / "wrong.beton")
    with pytest.raises(ValueError, match=words):
        BetonFile(tmp_path / "wrong.beton")


def test_all_images_of_another_size_are_refused_too(whole: Path, tmp_path: Path) -> None:
    for height, width in ((33, 32), (65_535, 65_535), (0, 32)):
        content = np.fromfile(whole, np.uint8)
        field(content, "table", "height")[:], field(content, "table", "width")[:] = height, width
        content.tofile(tmp_path / "wrong.beton")
        with pytest.raises(ValueError, match="not a complete"):
            BetonFile(tmp_path / "wrong.beton")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3 * PAGE + 700 * 24),
    st.lists(st.tuples(st.integers(0, TABLE + 700 * 24 - 1), st.integers(0, 255)), max_size=4),
    st.lists(st.tuples(st.integers(1, 700 * 24), st.integers(0, 255)), max_size=4),
    st.booleans(),
)
def test_cut_and_garbled_files_are_refused_or_read_within_their_bounds(
    whole: Path, size: int, first: list[tuple[int, int]], last: list[tuple[int, int]], cut: bool
) -> None:
    before = np.fromfile(whole, np.uint8)
    content = before.copy()
    for place, value in first:
        content[place] = value
    for place, value in last:
        content[-place] = value
    content = content[:size] if cut else content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wrong.beton"
        content.tofile(path)
        try:
            file = BetonFile(path)
        except ValueError:
            assert len(content) < len(before) or (content != before).any()
        else:
            assert len(content) == len(before)  # nothing may be missing
            images = file.images()
            pointers = field(content, "table", "pointer").astype(np.int64)
            assert np.array_equal(images[3].ravel(), content[pointers[3] : pointers[3] + 3072])


def test_an_empty_file_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.beton").write_bytes(b"")
    with pytest.raises(ValueError, match="not a complete"):
        BetonFile(tmp_path / "empty.beton")
    with pytest.raises(FileNotFoundError):
        BetonFile(tmp_path / "none.beton")


# --- reading ahead ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 699), max_size=50), st.integers(1, 60))
def test_batches_are_the_images_in_their_order(whole: Path, indices: list[int], size: int) -> None:
    file, order = BetonFile(whole), np.array(indices, np.int64)
    batches = list(file.batches(order, size))
    assert [len(some) for some in batches] == [len(order[at : at + size]) for at in range(0, len(order), size)]
    if indices:
        assert np.array_equal(np.concatenate(batches), samples(700, 32, 32)[0][order])


@pytest.mark.parametrize("taken", [1, 3])
def test_a_stream_that_is_left_ends_its_thread_and_a_wrong_index_is_an_error(whole: Path, taken: int) -> None:
    before = set(threading.enumerate())
    batches = BetonFile(whole).batches(np.arange(700), 10)
    for _ in range(taken):
        next(batches)
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    assert not thread.is_alive()
    with pytest.raises(IndexError):
        list(BetonFile(whole).batches(np.array([0, 700]), 1))
    time.sleep(0.01)
    assert set(threading.enumerate()) == before
