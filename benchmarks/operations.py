"""Counts the operations that torch dispatches in a step: on a GPU, where a step is bound by launches, about its cost.

    python -m benchmarks.operations [--preset block94] [--images 4] [--out FILE] [key=value ...]
    python -m benchmarks.operations --seconds 5 --images 250 [--size 32] ...

Views and allocations are not counted: they launch nothing. The forward pass on a GPU is counted with fake tensors,
which have the shapes and the device of real ones and no content, so that no GPU is needed, except by torch 2.9. With
--seconds, what these operations take of a step of one thread of the CPU, by kind, the median of that many steps.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import arguments
from benchmarks.table import measured_on, publish, spread, table
from dist_train import config
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import positive
from dist_train.config import Config
from dist_train.config.settings import Select
from dist_train.data.batches import Microbatch
from dist_train.distributed.device import DTYPES, keep_memory
from dist_train.distributed.ranks import join_ranks
from dist_train.errors import DONE
from dist_train.model.network import BlockNetwork
from dist_train.model.shapes import shapes
from dist_train.training.loop import State, TrainStep
from dist_train.training.schedule import Kind

_ALLOCATIONS = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty_strided")
# these are views wherever the layout allows it, without being marked so
_RESHAPES = ("aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh")


# The kinds of operations of a forward and backward pass, by a part of their names; the first that fits.
_KINDS = {
    "convolution": "convolutions",
    "mm": "1x1 kernels and fully connected layers",
    "pool2d": "pooling",
    "batch_norm": "BatchNorm",
    "gelu": "activation",
    "relu": "activation",
    "silu": "activation",
    "mul": "scaling by coefficients",
}
_DOTS, _AVERAGES, _REST = "dot products of coefficients", "averages", "the rest of the passes"


class Operations(TorchDispatchMode):
    """A context that counts the dispatched operations by name, but no views, allocations, queries and marks; and sums
    up the seconds of all operations by kind, on a CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name = Counter[str]()
        self.seconds = defaultdict[str, float](float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if not (func.is_view or name in (*_ALLOCATIONS, *_RESHAPES) or func.namespace in ("prim", "profiler")):
            self.by_name[name] += 1
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[_kind(name, args)] += time.perf_counter() - begin
        return result


def _kind(name: str, args: Any) -> str:
    if name in ("aten.bmm", "aten.baddbmm"):  # see `_sum_of_pixels` in dist_train/model/mixing.py
        return _AVERAGES
    if name == "aten.native_batch_norm_backward" and args[0].shape[0] == 1:  # and `_dot`
        return _DOTS
    return next((kind for part, kind in _KINDS.items() if part in name), _REST)


@contextmanager
def _training(settings: Config, images: int, size: int, classes: int) -> Iterator[tuple[TrainStep, list[Microbatch]]]:
    """A step of one rank on the CPU that has run once, after which momenta are allocated and constants kept; and the
    microbatches to run it with."""
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, compile=False))
    shape = (3, size, size)
    with join_ranks("cpu", 1, settings.train.deterministic, 60) as ranks:
        model = BlockNetwork(settings.model, shape, classes)
        state = State.start(settings, model, total_steps=100, images=1000)
        state.step = 50
        data: Any = SimpleNamespace(
            config=settings.data, size=images, total_steps=100, image_size=lambda step: (size, size)
        )
        step = TrainStep(settings.train, data, ranks, state)
        batches = [Microbatch(slot, *_batch(images, shape, classes)) for slot in range(settings.train.microbatches)]
        step(batches)
        yield step, batches


@contextmanager
def _microbatch(step: TrainStep) -> Iterator[tuple[BlockNetwork, Operations]]:
    """A copy of a step's network, which DDP does not wrap, and the operations in this context."""
    network = copy.deepcopy(step.state.model)
    network.zero_grad(set_to_none=True)
    dtype = DTYPES[step.settings.precision]
    with step.autocast, network.kernels_cast([k.to(dtype) for k in network.kernels]), Operations() as operations:
        yield network, operations


def count(settings: Config, images: int = 4, size: int = 32, classes: int = 10) -> dict[str, Counter[str]]:
    """The operations of each part of a step once the stem no longer learns, by name.

    images: in a microbatch, which changes no number. size: of the images in pixels."""
    parts: dict[str, Counter[str]] = {}
    with _training(settings, images, size, classes) as (step, batches):
        with Operations() as whole:
            step(batches)
        with _microbatch(step) as (network, pass_):
            step.forward_backward(network, batches[0], Kind(size, size, False, images, images))
        parts["forward and backward pass of a microbatch"] = pass_.by_name
        with Operations() as update:
            step.state.optimizers.step(step.state.scaler)
        parts["update of the weights"] = update.by_name
        parts["whole step"] = whole.by_name
    with suppress(torch.AcceleratorError):  # torch 2.9 asks the driver which kernel it would take
        parts["forward pass of a microbatch on a GPU"] = _forward_on_gpu(settings, images, (3, size, size), classes)
    return parts


def seconds(settings: Config, images: int, size: int, rounds: int, classes: int = 10) -> dict[str, list[float]]:
    """The seconds that each kind of operation takes of a step once the stem no longer learns, on one thread of the CPU,
    for each of `rounds` steps; and those of the whole step. The images of a microbatch are all trained on."""
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, select=Select()))
    torch.set_num_threads(1)
    keep_memory()
    parts = defaultdict[str, list[float]](list)
    with _training(settings, images, size, classes) as (step, batches):
        for _ in range(rounds):
            begin = time.perf_counter()
            step(batches)
            whole = time.perf_counter() - begin
            with _microbatch(step) as (network, pass_):
                for batch in batches:
                    step.forward_backward(network, batch, Kind(size, size, False, images, images))
            begin = time.perf_counter()
            step.state.optimizers.step(step.state.scaler)
            update = time.perf_counter() - begin
            for kind in (*dict.fromkeys(_KINDS.values()), _DOTS, _AVERAGES, _REST):
                parts[kind].append(pass_.seconds[kind])
            parts["update of the weights"].append(update)
            parts["sum of the gradients, casts, Python"].append(whole - update - sum(pass_.seconds.values()))
            parts["whole step"].append(whole)
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
            casts = [kernel.to(dtype) for kernel in model.kernels]
            with torch.no_grad(), model.kernels_cast(casts), forward:
                model(batch, stem_learns=False)
        finally:
            torch.set_autocast_enabled("cuda", False)
    return forward.by_name


@answers_bad_input
def main() -> int:
    parser = arguments.parser("operations", __doc__)
    parser.add_argument("--preset", default="block94")
    parser.add_argument("--images", type=positive, default=4, help="images in a microbatch (default: 4)")
    parser.add_argument("--size", type=positive, default=32, help="of the images in pixels (default: 32)")
    parser.add_argument("--seconds", type=positive, metavar="STEPS", help="time this many steps instead of counting")
    arguments.add_out(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    settings = config.load(args.preset, None, args.settings)
    shapes(settings.model, (3, args.size, args.size))  # raises UserError
    conditions = f"{args.preset}; {measured_on(torch.device('cpu'), 1)}"
    if args.seconds:
        parts = seconds(settings, args.images, args.size, args.seconds)
        whole = statistics.median(parts["whole step"])
        times = [
            [part, spread([1000 * t for t in each], 1), f"{100 * statistics.median(each) / whole:.1f} %"]
            for part, each in parts.items()
        ]
        header = ["part of a step", "ms: median (quartiles)", "share"]
        conditions = f"{settings.train.microbatches} microbatches, n = {args.seconds} steps; {conditions}"
        publish("benchmarks.operations", conditions, table(header, times), args.out)
        return DONE
    rows = [
        [part, names.total(), ", ".join(f"{n} {name.removeprefix('aten.')}" for name, n in names.most_common(8))]
        for part, names in count(settings, args.images, args.size).items()
    ]
    publish("benchmarks.operations", conditions, table(["part", "operations", "the most frequent"], rows), args.out)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
