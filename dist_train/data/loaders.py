"""Loaders of a split: `Resident` holds it in the device's memory, `Stream` reads it from its file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train import data_prep
from dist_train.config.settings import DataConfig
from dist_train.data_prep import ffcv_library


class Resident:
    """A split in the device's memory."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], device: torch.device) -> None:
        """images: (N, H, W, C). labels: (N,)."""
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of `size` in the order of `indices`, (n,) int64 on the CPU: (images, labels, indices) on the device,
        (size, H, W, C) uint8 and twice (size,) int64."""
        for batch in indices.to(self.images.device).split(size):
            yield self.images.index_select(0, batch), self.labels.index_select(0, batch), batch


class Stream:
    """A split that stays in its file, read through ffcv where it is installed."""

    def __init__(self, config: DataConfig, split: str, device: torch.device) -> None:
        self.file, self.device = data_prep.open_split(config.folder, split), device
        self.labels = torch.from_numpy(self.file.labels).to(device)
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches as `Resident.batches` gives them. On a CPU the next batch may overwrite the images of this one."""
        with closing(self._reader.batches(indices.numpy(), size)) as arrays:  # closing ends ffcv's thread
            for batch, images in zip(indices.to(self.device).split(size), arrays, strict=True):
                yield self._on_device(torch.from_numpy(images)), self.labels.index_select(0, batch), batch

    def _on_device(self, images: Tensor) -> Tensor:
        if self.copying is None:
            return images
        with torch.cuda.stream(self.copying):  # in the current stream the copy would wait for all queued kernels
            copied = images.to(self.device)
        copied.record_stream(torch.cuda.current_stream(self.device))
        return copied

    @cached_property
    def _reader(self) -> data_prep.BetonFile | ffcv_library.Stream:
        """ffcv's reader where it is installed, else the file. Made at its first use, since ffcv's takes seconds."""
        return ffcv_library.Stream(self.file.path, self.file.shape) if ffcv_library.version() else self.file
