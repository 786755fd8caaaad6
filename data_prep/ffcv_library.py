"""All that is done through ffcv where it is installed; elsewhere beton_file.py does the same with the same files."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dist_train.data_prep.beton_file import Images, Labels, page_size


@cache
def version() -> str | None:
    """The version of ffcv, which then is what writes and streams betons; None where it is not installed. One that is
    installed but cannot be imported counts as missing, and stderr is told once. The first call takes seconds."""
    if find_spec("ffcv") is None:
        return None
    try:
        with _keeping_torch_threads():
            _import()
    except Exception as error:  # a library that is missing or of another version shows as anything
        if os.environ.get("RANK", "0") == "0":  # of the ranks of a launch one is enough
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"data_prep: ffcv is installed but cannot be imported ({reason}): betons are written and read without "
                f"it, to the same effect; repair it, or pip uninstall ffcv",
                file=sys.stderr,
                flush=True,
            )
        return None
    return importlib.metadata.version("ffcv")


def _import() -> None:
    """Import ffcv without the seconds in which numba compiles a dictionary of its two image modes: only plain
    Python reads it."""
    import numba.typed

    typed = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        import ffcv  # noqa: F401
    finally:
        numba.typed.Dict = typed


@contextmanager
def _keeping_torch_threads() -> Iterator[None]:
    """Undo what importing ffcv and building a Loader do to the number of torch threads of the process."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write(path: Path, images: Images, labels: Labels) -> None:
    """What beton_file.write does, with ffcv's DatasetWriter, in order and in this process.

    DatasetWriter.from_indexed_dataset does the same steps in forked workers, but waits for ever if one of
    them fails (a full disk), and leaves them behind if this process is killed. One process writes
    CIFAR-10 just as fast, and the same bytes every time.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample
    from tqdm import tqdm

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    page = page_size(images[0].size)
    writer = DatasetWriter(str(path), fields, page_size=page, num_workers=1)
    writer.num_samples = len(images)
    writer.prepare()
    try:
        table = np.zeros(len(images), writer.metadata_type)
        allocator = MemoryAllocator(str(path), writer.data_region_start, page)
        try:
            with allocator:
                for i in tqdm(range(len(images)), desc=f"write {path.name}", unit="image", disable=None):
                    sample = (images[i], int(labels[i]))
                    handle_sample(sample, i, writer.metadata_type.names, table, allocator, fields)
        finally:
            allocator.fp.close()  # the allocator leaves it open if its last write fails
        writer.metadata_sm.buf[: table.nbytes] = table.tobytes()
        writer.finalize(allocator.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()


class Stream:
    """ffcv's Loader on a file that BetonFile has checked: it decodes images and does nothing else."""

    _compiled: ClassVar[dict[tuple[int, ...], Any]] = {}  # by image shape: a Loader whose code fits any other file

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        """shape: (H, W, 3) of the images."""
        from ffcv.fields.decoders import SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.memory_managers import OSCacheManager
        from ffcv.reader import Reader
        from ffcv.transforms import ToTensor

        if shape in self._compiled:
            self._loader = copy(self._compiled[shape])
            self._loader.reader = Reader(str(path))
            self._loader.memory_manager = OSCacheManager(self._loader.reader)
        else:
            with _keeping_torch_threads():
                self._loader = self._compiled[shape] = Loader(
                    str(path),
                    batch_size=1,
                    num_workers=1,  # copying needs no more, and code for one compiles faster
                    seed=0,  # unused by this order, but none would draw from numpy's generator
                    os_cache=True,
                    order=OrderOption.SEQUENTIAL,
                    drop_last=False,
                    pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": None},
                )

    def batches(self, indices: NDArray[np.int64], size: int) -> Generator[Images, None, None]:
        """The images at `indices`, `size` at a time, in a buffer that is filled anew: they are valid until the next
        ones are asked for."""
        import torch

        loader, order = self._loader, indices.astype(np.uint64)
        # ffcv sets torch's threads to its own, also while it runs, so it must have the same number
        loader.num_workers = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        # its sequential order is the given indices; both can be set anew for every epoch
        loader.batch_size, loader.traversal_order.indices, loader.first_traversal_order = size, order, order
        images = iter(loader)
        try:
            for (some,) in images:
                yield some.numpy()
        finally:
            # ends ffcv's thread, also if not all was asked for: there is nothing more to decode, and room for what it
            # still has and for its word that it has ended, for which it would otherwise wait for ever
            images.iter_ixes = iter(())
            images.output_queue.maxsize = 1 << 30
            images.close()
            with suppress(Empty):
                while True:  # wakes it
                    images.output_queue.get_nowait()
