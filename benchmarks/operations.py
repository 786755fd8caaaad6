"""Counts the operations that torch dispatches in a step: on a GPU, where a step is bound by launches, about its cost.

    python -m benchmarks.operations [--preset block94] [--images 4] [--out FILE] [key=value ...]

Views and allocations are not counted: they launch nothing. The forward pass on a GPU is counted with fake tensors,
which have the shapes and the device of real ones and no content, so that no GPU is needed, except by torch 2.9.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.table import measured_on, publish, table
from dist_train import config
from dist_train.config import Config
from dist_train.data.batches import Microbatch
from dist_train.distributed.device import DTYPES
from dist_train.distributed.ranks import join_ranks
from dist_train.model.network import BlockNetwork
from dist_train.training.loop import State, TrainStep

_ALLOCATIONS = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty_strided")
# these are views wherever the layout allows it, without being marked so
_RESHAPES = ("aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh")


class Operations(TorchDispatchMode):
    """A context that counts the dispatched operations by name, but no views, allocations, queries and marks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if not (func.is_view or name in (*_ALLOCATIONS, *_RESHAPES) or func.namespace in ("prim", "profiler")):
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


def count(settings: Config, images: int = 4, size: int = 32, classes: int = 10) -> dict[str, Counter[str]]:
    """The operations of each part of a step once the stem no longer learns, by name.

    images: in a microbatch, which changes no number. size: of the images in pixels."""
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, compile=False))
    shape = (3, size, size)
    parts: dict[str, Counter[str]] = {}
    with join_ranks("cpu", 1, settings.train.deterministic, 60) as ranks:
        model = BlockNetwork(settings.model, shape, classes)
        state = State.start(settings, model, total_steps=100, images=1000)
        state.step = 50
        data: Any = SimpleNamespace(
            config=settings.data, size=images, total_steps=100, image_size=lambda step: (size, size)
        )
        step = TrainStep(settings.train, data, ranks, state)
        batches = [Microbatch(slot, *_batch(images, shape, classes)) for slot in range(settings.train.microbatches)]
        step(batches)  # the momenta are allocated, and constants kept
        with Operations() as whole:
            step(batches)
        network = copy.deepcopy(model)  # one that DDP does not wrap
        network.zero_grad(set_to_none=True)
        with step.autocast, network.kernels_cast(DTYPES[settings.train.precision]), Operations() as pass_:
            step.forward_backward(network, batches[0], images, stem_learns=False)
        parts["forward and backward pass of a microbatch"] = pass_.by_name
        with Operations() as update:
            state.optimizers.step(state.scaler)
        parts["update of the weights"] = update.by_name
        parts["whole step"] = whole.by_name
    with suppress(torch.AcceleratorError):  # torch 2.9 asks the driver which kernel it would take
        parts["forward pass of a microbatch on a GPU"] = _forward_on_gpu(settings, images, shape, classes)
    return parts


def _batch(images: int, shape: tuple[int, int, int], classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.arange(images) % classes
    return torch.randn(images, *shape).to(memory_format=torch.channels_last), labels, labels


def _forward_on_gpu(settings: Config, images: int, shape: tuple[int, int, int], classes: int) -> Counter[str]:
    model = BlockNetwork(settings.model, shape, classes)
    dtype = DTYPES[settings.train.precision]
    forward = Operations()
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                on_gpu = torch.empty_strided(parameter.shape, parameter.stride(), device="cuda")
                setattr(module, name, nn.Parameter(on_gpu, requires_grad=parameter.requires_grad))
        batch = torch.empty(images, *shape, device="cuda").to(memory_format=torch.channels_last)
        # torch.autocast would disable itself where there is no GPU
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            with torch.no_grad(), model.kernels_cast(dtype), forward:
                model(batch, stem_learns=False)
        finally:
            torch.set_autocast_enabled("cuda", False)
    return forward.by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="block94")
    parser.add_argument("--images", type=int, default=4, help="images in a microbatch (default: 4)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    settings = config.load(args.preset, None, args.settings)
    parts = count(settings, args.images)
    rows = [
        [part, names.total(), ", ".join(f"{n} {name.removeprefix('aten.')}" for name, n in names.most_common(8))]
        for part, names in parts.items()
    ]
    conditions = f"{args.preset}; {measured_on(torch.device('cpu'), 1)}"
    publish("benchmarks.operations", conditions, table(["part", "operations", "the most frequent"], rows), args.out)


if __name__ == "__main__":
    main()
