"""Writing and streaming betons through ffcv where it is installed; without it beton_file.py does the same."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dist_train.data_prep.beton_file import Images, Labels, page_size
from dist_train.errors import say


@cache
def version() -> str | None:
    """The version of ffcv; `unknown` where its package has no metadata; None where it is not installed or cannot be
    imported, and the latter is reported on stderr once. The first call takes seconds."""
    if find_spec("ffcv") is None:
        return None
    try:
        with _keeping_torch_threads():
            _import()
    except Exception as error:  # a missing or incompatible library may raise anything
        if os.environ.get("RANK", "0") == "0":  # report it on one rank only
            reason = " ".join(str(error).split()) or type(error).__name__
            say(
                f"ffcv is installed but cannot be imported ({reason}): betons are written and read without it, with "
                f"the same result; repair it, or pip uninstall ffcv",
                "data_prep",
            )
        return None
    try:
        return importlib.metadata.version("ffcv")
    except importlib.metadata.PackageNotFoundError:  # a copy of its folder alone
        return "unknown"


def _import() -> None:
    """Import ffcv, with a plain dict in place of numba's for ffcv's two image modes, which only Python reads: 2.0 s of
    CPU time in place of 5.6 s on a Xeon, since numba would compile a dictionary type."""
    import numba.typed

    typed = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        import ffcv  # noqa: F401
    finally:
        numba.typed.Dict = typed


@contextmanager
def _keeping_torch_threads() -> Iterator[None]:
    """A context that restores the process's number of torch threads, which ffcv's import and its Loader change."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Buffer:
    """A block of this process's own memory, where ffcv takes shared memory."""

    def __init__(self, create: bool, size: int) -> None:
        self.buf = bytearray(size)


class _Number:
    """A number of this process's own, where ffcv takes a shared one."""

    def __init__(self, _type: Any, value: int) -> None:
        self.value = value

    def get_lock(self) -> nullcontext[None]:
        return nullcontext()


@contextmanager
def _own_memory() -> Iterator[None]:
    """A context in which ffcv's writer takes no shared memory: a process is killed where that is full, and one process
    needs none."""
    from ffcv import memory_allocator, writer

    shared = writer.shared_memory, memory_allocator.Value
    writer.shared_memory, memory_allocator.Value = SimpleNamespace(SharedMemory=_Buffer), _Number
    try:
        yield
    finally:
        writer.shared_memory, memory_allocator.Value = shared


def write(path: Path, images: Images, labels: Labels) -> None:
    """Write the same file as beton_file.write, with ffcv's DatasetWriter, in this process. Raises OSError.

    DatasetWriter.from_indexed_dataset does the same in forked workers, but waits forever if one of them fails (a full
    disk), and leaves them running if this process is killed. One process writes CIFAR-10 just as fast, and always the
    same bytes.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample
    from tqdm import tqdm

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    page = page_size(images[0].size)
    writer = DatasetWriter(str(path), fields, page_size=page, num_workers=1)
    writer.num_samples = len(images)
    with _own_memory():
        writer.prepare()
        allocator = MemoryAllocator(str(path), writer.data_region_start, page)
    table = np.zeros(len(images), writer.metadata_type)
    try:
        with allocator:
            for i in tqdm(range(len(images)), desc=f"write {path.name}", unit="image", disable=None):
                sample = (images[i], int(labels[i]))
                handle_sample(sample, i, writer.metadata_type.names, table, allocator, fields)
    finally:
        allocator.fp.close()  # the allocator leaves it open if its last write fails
    writer.metadata_sm.buf[:] = table.tobytes()
    writer.finalize(allocator.allocations)


class Stream:
    """ffcv's Loader on a file that BetonFile has checked; it only decodes images."""

    _compiled: ClassVar[dict[tuple[int, ...], Any]] = {}  # a Loader for each image shape, to reuse its compiled code

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
                    num_workers=1,  # enough for copying, and faster to compile
                    seed=0,  # unused, but without it ffcv would draw from numpy's global generator
                    os_cache=True,
                    order=OrderOption.SEQUENTIAL,
                    drop_last=False,
                    pipelines={"image": [SimpleRGBImageDecoder(), ToTensor()], "label": None},
                )

    def batches(self, indices: NDArray[np.int64], size: int) -> Generator[Images, None, None]:
        """The images at `indices` in batches: (size, H, W, 3) uint8, in a buffer that the next batch overwrites."""
        import numba
        import torch

        loader, order, threads = self._loader, indices.astype(np.uint64), torch.get_num_threads()
        loader.num_workers = min(threads, vars(numba.config)["NUMBA_NUM_THREADS"], len(os.sched_getaffinity(0)))
        # its sequential order returns the indices that it was made with; replace them for each epoch
        loader.batch_size, loader.traversal_order.indices, loader.first_traversal_order = size, order, order
        images = iter(loader)
        try:
            for (batch,) in images:
                # ffcv has set it to its own number of workers, here and in its thread, before the first batch
                torch.set_num_threads(threads)
                yield batch.numpy()
        finally:
            # End ffcv's thread, also before the last batch: leave nothing to decode, and make room in its output queue
            # for its last batches and its end marker; otherwise the thread would wait for room forever.
            images.iter_ixes = iter(())
            images.output_queue.maxsize = 1 << 30
            images.close()
            with suppress(Empty):
                while True:  # each get wakes the thread
                    images.output_queue.get_nowait()
