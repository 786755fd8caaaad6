"""Loaders of a split: `Resident` holds it on the device, `Stream` reads it from its file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import cached_property

import torch
from torch import Tensor

from dist_train import data_prep
from dist_train.config.settings import DataConfig
from dist_train.data_prep import ffcv_library


class Resident:
    """A whole split on the device."""

    def __init__(self, config: DataConfig, split: str, device: torch.device) -> None:
        images, labels = data_prep.read_split(config.folder, split)
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, indices) in the order of `indices`, `size` at a time."""
        for chosen in indices.to(self.images.device).split(size):
            yield self.images.index_select(0, chosen), self.labels.index_select(0, chosen), chosen


class Stream:
    """A split that stays in its file, read through ffcv where it is installed."""

    def __init__(self, config: DataConfig, split: str, device: torch.device) -> None:
        self.file, self.device = data_prep.open_split(config.folder, split), device
        self.labels = torch.from_numpy(self.file.labels).to(device)
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, indices) in the order of `indices`, `size` at a time. The images may lie in a buffer that
        is filled anew: they are valid until the next ones are asked for."""
        with closing(self._reader.batches(indices.numpy(), size)) as images:  # ends its thread
            for chosen, some in zip(indices.to(self.device).split(size), images, strict=True):
                yield self._on_device(torch.from_numpy(some)), self.labels.index_select(0, chosen), chosen

    def _on_device(self, images: Tensor) -> Tensor:
        if self.copying is None:
            return images
        with torch.cuda.stream(self.copying):  # in the current stream it would wait for all kernels before it
            copied = images.to(self.device)
        copied.record_stream(torch.cuda.current_stream(self.device))
        return copied

    @cached_property
    def _reader(self) -> data_prep.BetonFile | ffcv_library.Stream:
        """Built when it is first used: ffcv takes seconds."""
        return ffcv_library.Stream(self.file.path, self.file.shape) if ffcv_library.version() else self.file
