"""Checks on a CPU that work could be recorded as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class Capture(TorchDispatchMode):
    """A context for two calls of the same work. The first may make constants that are kept. With `strict` set, the
    second raises AssertionError where a capture by CUDA would fail: where the host makes a tensor from numbers of its
    own, which would be copied to the GPU, or reads one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.strict = False
        self.known: dict[int, object] = {}  # storages by address, kept, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if self.strict:
            mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
            assert not mask, "a mask as an index waits for the number of its elements"
            assert func not in WAITS, f"{func} waits for the device"
            new = [tensor for tensor in _tensors(args, kwargs) if tensor.untyped_storage().data_ptr() not in self.known]
            assert not new, f"{func} reads a tensor that the host makes in every call: {new}"
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(args, kwargs, result):
            storage = tensor.untyped_storage()
            self.known[storage.data_ptr()] = storage
        return result


def _tensors(*trees: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
