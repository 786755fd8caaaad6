"""What the sum in a fixed order costs, beside plain DDP's all-reduce of the same gradients.

    python -m benchmarks.reduction            # time per step, on CPUs with gloo
    python -m benchmarks.reduction --bytes    # bytes on the wire: counted, and by the formula
    python -m benchmarks.reduction --table    # the formula alone, up to 1024 ranks

Prints Markdown tables. Ranks are real processes on this machine, forked from this one, which has imported torch; they
talk over the loopback of a network namespace of their own where the kernel grants one, so that every byte counted
there is theirs. Each run holds both ways and takes their steps in turns, so that whatever else the machine does hits
both; the ratio of CPU times is nearly free of it. Plain DDP is what a user without this project would write: the
rank's microbatches under `no_sync`, the last one with DDP's own all-reduce. TORCH_CPP_LOG_LEVEL=ERROR keeps torch
from wondering at a network without name resolution.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import importlib
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.table import spread
from dist_train import config
from dist_train.distributed.gradient_sum import FixedOrderSum, cost, pieces
from dist_train.distributed.ranks import Ranks, join_ranks, share
from dist_train.model.network import BlockNetwork
from dist_train.training.optimizers import Optimizers

DONE, REFUSED = 0, 77  # exit codes; the second: --bytes, and no network namespace
_WARM_UP = 2  # DDP lays its buckets out anew after the first step
_MICROBATCHES = 8  # every preset's
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Work:
    """What is timed. preset: whole training steps of its network, on random images; None: gradients that are there
    already, and nothing else. elements: how many, in one parameter; None: those of block94, in its shapes."""

    preset: str | None = None
    elements: int | None = None


@dataclass(frozen=True)
class Step:
    """One step: seconds until the last rank was done, seconds of CPU of all ranks, bytes through the loopback."""

    seconds: float
    cpu: float
    sent: int


Way = Callable[[], object]


class Given(nn.Module):
    """Parameters whose gradients cost nothing but their copying."""

    def __init__(self, like: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = [torch.randn_like(tensor) for tensor in like]
        self.parts = nn.ParameterList(torch.zeros_like(tensor) for tensor in self.given)

    def forward(self) -> Tensor:
        loss: Tensor = _Given.apply(self.given, *self.parts)
        return loss


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, given: list[Tensor], *_: Tensor) -> Tensor:
        ctx.given = given  # type: ignore[attr-defined]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> tuple[Tensor | None, ...]:
        # new tensors, as a network's backward gives; others would be copied again where they are kept
        return (None, *(tensor.clone() for tensor in ctx.given))  # type: ignore[attr-defined]


def network(preset: str, microbatches: int) -> tuple[config.Config, BlockNetwork]:
    """The preset's network, with any weights."""
    settings = config.load(preset, None, [])
    return settings, BlockNetwork(settings.model, (3, 32, 32), 10, microbatches)


def gradients_of_block94() -> list[Tensor]:
    return [p.detach() for p in network("block94", _MICROBATCHES)[1].parameters() if p.requires_grad]


def prepare(work: Work, microbatches: int) -> tuple[nn.Module, Callable[[nn.Module, int], Tensor], Way]:
    """The network, its loss of a microbatch through whatever wraps it, and the update of its weights."""
    torch.manual_seed(0)
    if work.preset is None:
        given = Given(gradients_of_block94() if work.elements is None else [torch.zeros(work.elements)])
        return given, lambda wrapped, slot: wrapped(), lambda: None
    settings, model = network(work.preset, microbatches)
    t = settings.train
    optimizers = Optimizers(model, settings.optim, 1000, 100)
    optimizers.set_rates(500)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sizes = [len(share(t.batch_size, slot, microbatches)) for slot in range(microbatches)]
    images = [torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last) for size in sizes]
    labels = [torch.randint(10, (size,)) for size in sizes]

    def loss(wrapped: nn.Module, slot: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=t.precision == "bf16"):
            logits: Tensor = wrapped(images[slot], torch.tensor([slot]))
        return F.cross_entropy(logits.float(), labels[slot], reduction="sum") / t.batch_size

    return model, loss, lambda: optimizers.step(scaler)


def plain(here: Ranks, work: Work, microbatches: int) -> Way:
    """A step of plain DDP."""
    model, loss, update = prepare(work, microbatches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option has a new name in new versions
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    slots = here.share(microbatches)

    def step() -> None:
        ddp.zero_grad(set_to_none=True)
        for slot in slots:
            with nullcontext() if slot == slots[-1] else ddp.no_sync():
                loss(ddp, slot).backward()
        update()

    return step


def fixed(here: Ranks, work: Work, microbatches: int) -> Way:
    """A step of the sum in a fixed order."""
    model, loss, update = prepare(work, microbatches)
    summed = FixedOrderSum(here, model, microbatches)

    def step() -> None:
        for index, slot in enumerate(summed.slots):
            with summed.microbatch(index):
                loss(summed.ddp, slot).backward()
        update()

    return step


def in_turns(ways: list[Way], steps: int) -> list[list[Step]]:
    """Run every way's step `steps` times. On every rank. Returns the steps of each way."""
    sent: list[list[int]] = [[] for _ in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    cpu: list[list[float]] = [[] for _ in ways]
    for number in range(-_WARM_UP, steps):
        order = range(len(ways)) if number % 2 else reversed(range(len(ways)))
        for way in order:
            before = through_loopback()  # right on rank 0: until it enters the barrier nobody sends more than that
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            ways[way]()
            elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
            dist.barrier()
            bytes_sent = through_loopback() - before
            if number >= 0:
                sent[way].append(bytes_sent)
                seconds[way].append(elapsed)
                cpu[way].append(cpu_elapsed)
    slowest, together = torch.tensor(seconds), torch.tensor(cpu)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(together)
    every = zip(slowest.tolist(), together.tolist(), sent, strict=True)
    return [[Step(*found) for found in zip(*way, strict=True)] for way in every]


def through_loopback() -> int:
    """Bytes that the loopback has sent, with their headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("no loopback device in /proc/self/net/dev")


def as_rank(rank: int, world_size: int, port: int, work: Work, microbatches: int, steps: int) -> list[list[Step]]:
    """Be one of the ranks. Returns the steps of plain DDP and of the fixed order."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, **where}
    os.environ.update({name: str(value) for name, value in launched.items()})
    with join_ranks("cpu", threads=1, deterministic=True, timeout=120) as here:
        return in_turns([plain(here, work, microbatches), fixed(here, work, microbatches)], steps)


def measure(work: Work, microbatches: int, world_size: int, steps: int) -> list[list[Step]]:
    """The steps of plain DDP and of the fixed order, as rank 0 saw them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = partial(as_rank, world_size=world_size, port=port, work=work, microbatches=microbatches, steps=steps)
    with ProcessPoolExecutor(world_size, _FORK) as pool:
        return next(pool.map(rank, range(world_size)))


def on_the_wire(elements: int, microbatches: int, world_size: int) -> tuple[int, int]:
    """Bytes that all ranks together send for one sum, by the formulas: (ring all-reduce, fixed order). The second
    adds up what `cost` gives for the busiest rank."""
    shares = [share(microbatches, rank, world_size) for rank in range(world_size)]
    slices = sum(len(pieces(leaves, microbatches)) for leaves in shares)
    part = 4 * -(-elements // world_size)
    return 2 * world_size * (world_size - 1) * part, (slices + world_size) * (world_size - 1) * part


def private_network() -> None:
    """Leave this machine's network for one of nothing but a loopback. Raises OSError when that is refused."""
    new_network, new_user = 0x40000000, 0x10000000  # CLONE_NEWNET, CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_network if os.geteuid() == 0 else new_network | new_user):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", 1))  # SIOCSIFFLAGS: IFF_UP


def cases(world_sizes: list[int]) -> Iterator[tuple[int, int]]:
    """(world size, microbatches): those of the presets, and one for each rank."""
    for world_size in world_sizes:
        yield world_size, max(_MICROBATCHES, world_size)
        if world_size < _MICROBATCHES:
            yield world_size, world_size


def print_times(world_sizes: list[int], steps: int, preset: str) -> None:
    print(f"n = {steps} steps of each, in turns. Milliseconds: median (quartiles). Ratios: of neighbouring steps.\n")
    print("| step | ranks | microbatches | plain DDP | fixed order | ratio | ratio of CPU time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for work, name in ((Work(preset), f"whole, `{preset}`"), (Work(), "reduction alone, `block94`")):
        for world_size, microbatches in cases(world_sizes):
            theirs, ours = measure(work, microbatches, world_size, steps)
            cells = [name, str(world_size), str(microbatches)]
            cells += [spread([1000 * step.seconds for step in way], 1) for way in (theirs, ours)]
            pairs = list(zip(ours, theirs, strict=True))
            cells.append(spread([mine.seconds / other.seconds for mine, other in pairs], 2))
            cells.append(spread([mine.cpu / other.cpu for mine, other in pairs], 2))
            print("| " + " | ".join(cells) + " |", flush=True)


def print_bytes(world_sizes: list[int], steps: int, elements: int | None) -> None:
    count = sum(tensor.numel() for tensor in gradients_of_block94()) if elements is None else elements
    print(f"{count:,} elements, all ranks together. Counted: bytes of a step, median of n = {steps} (min..max).\n")
    print("| ranks | microbatches | plain DDP: formula | counted | ratio | fixed order: formula | counted | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for world_size, microbatches in cases(world_sizes):
        cells = [str(world_size), str(microbatches)]
        measured = measure(Work(elements=elements), microbatches, world_size, steps)
        for expected, way in zip(on_the_wire(count, microbatches, world_size), measured, strict=True):
            counted = [step.sent for step in way]
            middle = statistics.median_low(counted)
            ratio = f"{middle / expected:.4f}" if expected else "-"
            cells += [f"{expected:,}", f"{middle:,} ({min(counted):,}..{max(counted):,})", ratio]
        print("| " + " | ".join(cells) + " |", flush=True)


def print_table() -> None:
    elements = sum(tensor.numel() for tensor in gradients_of_block94())
    print(f"{elements:,} float32 elements, {4 * elements / 1e6:.2f} MB. Of the rank that it costs most, in MB.\n")
    print("| ranks | microbatches | sent | received | ring all-reduce, each | buffers | messages |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for world_size in (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024):
        microbatches = max(_MICROBATCHES, world_size)
        found = cost(elements, microbatches, world_size)
        ring = 4 * 2 * elements * (world_size - 1) / world_size
        megabytes = [f"{count / 1e6:.2f}" for count in (found.sent, found.received, ring, found.memory)]
        print(f"| {world_size} | {microbatches} | {' | '.join(megabytes)} | {found.messages:,} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reduction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--bytes", action="store_true", help="count bytes on the wire; needs a network namespace")
    what.add_argument("--table", action="store_true", help="print the formula, without measuring")
    parser.add_argument("--ranks", metavar="N", type=int, nargs="+", help="default: 1 2 3 4; with --bytes 1 to 8")
    parser.add_argument("--steps", metavar="N", type=int, help="steps of each way (default: 40; with --bytes 5)")
    parser.add_argument("--preset", default="digits", help="whose whole steps to time (default: digits)")
    parser.add_argument("--elements", metavar="N", type=int, help="with --bytes: default those of block94")
    args = parser.parse_args()
    if args.table:
        print_table()
        return DONE
    importlib.import_module("torch._dynamo")  # takes seconds, and every rank would do it as it joins the others
    # only a process of one thread may leave for new namespaces as a user
    process = _FORK.Process(target=_run, args=(args,))
    process.start()
    process.join()
    return process.exitcode or DONE


def _run(args: argparse.Namespace) -> None:
    try:
        private_network()
    except OSError as error:
        if args.bytes:
            print(f"--bytes needs a network namespace, which is refused here: {error}", file=sys.stderr)
            sys.exit(REFUSED)
    if args.bytes:
        print_bytes(args.ranks or list(range(1, 9)), args.steps or 5, args.elements)
    else:
        print_times(args.ranks or [1, 2, 3, 4], args.steps or 40, args.preset)


if __name__ == "__main__":
    sys.exit(main())
