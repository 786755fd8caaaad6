"""Measures the cost of the sum in a fixed order, against plain DDP's all-reduce of the same gradients.

    python -m benchmarks.reduction            # time per step, on CPUs with gloo
    python -m benchmarks.reduction --bytes    # bytes on the wire: counted, and by the formula
    python -m benchmarks.reduction --table    # the formula alone, up to 1024 ranks

Prints Markdown tables. Ranks are real processes on this machine, forked from this one, which has imported torch; they
talk over the loopback of a network namespace of their own where the kernel grants one, where only
their bytes are counted. Each run has both ways, whose steps take turns, so that other load on the machine affects both;
the ratio of CPU times is nearly independent of it. Plain DDP is what a user without this project would write: the
rank's microbatches under `no_sync`, the last one with DDP's own all-reduce. TORCH_CPP_LOG_LEVEL=ERROR silences torch's
warning of a network without name resolution.
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

from benchmarks import arguments
from benchmarks.table import spread
from dist_train import config
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import count, positive
from dist_train.distributed.gradient_sum import FixedOrderSum, cost, pieces
from dist_train.distributed.ranks import Ranks, join_ranks, share
from dist_train.errors import DONE
from dist_train.model.network import BlockNetwork
from dist_train.training.optimizers import Optimizers

REFUSED = 77  # exit code: --bytes, and no network namespace
_WARM_UP = 2  # steps that are not counted; DDP rebuilds its buckets after the first
_MICROBATCHES = 8  # every preset's
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Work:
    """The work of a step. preset: whole training steps of its network, on random images; None: only the sum of given
    gradients. elements: of these gradients, in one parameter; None: the gradients of block94."""

    preset: str | None = None
    elements: int | None = None


@dataclass(frozen=True)
class Step:
    """One step: seconds until the last rank was done, seconds of CPU of all ranks, bytes through the loopback."""

    seconds: float
    cpu: float
    sent: int


Way = Callable[[], object]  # a step


class FixedGradients(nn.Module):
    """Parameters with given gradients, which backward only copies."""

    def __init__(self, like: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = [torch.randn_like(tensor) for tensor in like]
        self.parts = nn.ParameterList(torch.zeros_like(tensor) for tensor in self.given)

    def forward(self) -> Tensor:
        loss: Tensor = _FixedGradients.apply(self.given, *self.parts)
        return loss


class _FixedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, given: list[Tensor], *_: Tensor) -> Tensor:
        ctx.given = given  # type: ignore[attr-defined]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> tuple[Tensor | None, ...]:
        # new tensors, as from a network's backward; autograd would copy others once more
        return (None, *(tensor.clone() for tensor in ctx.given))  # type: ignore[attr-defined]


def network(preset: str) -> tuple[config.Config, BlockNetwork]:
    """The preset's configuration, and its network with initial weights."""
    settings = config.load(preset, None, [])
    return settings, BlockNetwork(settings.model, (3, 32, 32), 10)


def gradients_of_block94() -> list[Tensor]:
    """Tensors in the shapes of block94's gradients."""
    return [p.detach() for p in network("block94")[1].parameters() if p.requires_grad]


def prepare(work: Work, microbatches: int) -> tuple[nn.Module, Callable[[nn.Module, int], Tensor], Way]:
    """The network; a function from the wrapped network and a microbatch's number to the loss; and the optimizer
    step."""
    torch.manual_seed(0)
    if work.preset is None:
        given = FixedGradients(gradients_of_block94() if work.elements is None else [torch.zeros(work.elements)])
        return given, lambda wrapped, slot: wrapped(), lambda: None
    settings, model = network(work.preset)
    t = settings.train
    optimizers = Optimizers(model, settings.optim, 1000)
    optimizers.set_rates(500)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sizes = [len(share(t.batch_size, slot, microbatches)) for slot in range(microbatches)]
    images = [torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last) for size in sizes]
    labels = [torch.randint(10, (size,)) for size in sizes]

    def loss(wrapped: nn.Module, slot: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=t.precision == "bf16"):
            logits: Tensor = wrapped(images[slot])
        return F.cross_entropy(logits.float(), labels[slot], reduction="sum") / t.batch_size

    return model, loss, lambda: optimizers.step(scaler)


def plain(ranks: Ranks, work: Work, microbatches: int) -> Way:
    """A step of plain DDP."""
    model, loss, update = prepare(work, microbatches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have another name for the option
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    slots = ranks.share(microbatches)

    def step() -> None:
        ddp.zero_grad(set_to_none=True)
        for slot in slots:
            with nullcontext() if slot == slots[-1] else ddp.no_sync():
                loss(ddp, slot).backward()
        update()

    return step


def fixed(ranks: Ranks, work: Work, microbatches: int) -> Way:
    """A step of the sum in a fixed order."""
    model, loss, update = prepare(work, microbatches)
    summed = FixedOrderSum(ranks, model, microbatches)

    def step() -> None:
        for index, slot in enumerate(summed.slots):
            with summed.microbatch(index):
                loss(summed.wrap(), slot).backward()
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
            before = through_loopback()  # exact on rank 0: until it enters the barrier no rank can send more
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
    steps_of_ways = zip(slowest.tolist(), together.tolist(), sent, strict=True)
    return [[Step(*numbers) for numbers in zip(*way, strict=True)] for way in steps_of_ways]


def through_loopback() -> int:
    """The number of bytes that the loopback has sent, headers included. Raises OSError where there is none."""
    for line in Path("/proc/self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("no loopback device in /proc/self/net/dev")


def as_rank(rank: int, world_size: int, port: int, work: Work, microbatches: int, steps: int) -> list[list[Step]]:
    """Run one of the ranks. Returns the steps of plain DDP and of the fixed order."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, **rendezvous}
    os.environ.update({name: str(value) for name, value in environment.items()})
    with join_ranks("cpu", threads=1, deterministic=True, timeout=120) as ranks:
        return in_turns([plain(ranks, work, microbatches), fixed(ranks, work, microbatches)], steps)


def measure(work: Work, microbatches: int, world_size: int, steps: int) -> list[list[Step]]:
    """The steps of plain DDP and of the fixed order, as measured on rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = partial(as_rank, world_size=world_size, port=port, work=work, microbatches=microbatches, steps=steps)
    with ProcessPoolExecutor(world_size, _FORK) as pool:
        return next(pool.map(rank, range(world_size)))


def on_the_wire(elements: int, microbatches: int, world_size: int) -> tuple[int, int]:
    """Bytes that all ranks together send for one sum, by the formulas: (ring all-reduce, fixed order). The second is
    the sum over the ranks of what `cost` computes for the busiest one."""
    shares = [share(microbatches, rank, world_size) for rank in range(world_size)]
    slices = sum(len(pieces(leaves, microbatches)) for leaves in shares)
    part = 4 * -(-elements // world_size)
    return 2 * world_size * (world_size - 1) * part, (slices + world_size) * (world_size - 1) * part


def private_network() -> None:
    """Move this process to a network namespace that has only a loopback. Raises OSError when that is refused."""
    new_network, new_user = 0x40000000, 0x10000000  # CLONE_NEWNET, CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_network if os.geteuid() == 0 else new_network | new_user):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", 1))  # SIOCSIFFLAGS: IFF_UP


def cases(world_sizes: list[int]) -> Iterator[tuple[int, int]]:
    """(world size, microbatches): with the microbatches of the presets, and with one for each rank."""
    for world_size in world_sizes:
        yield world_size, max(_MICROBATCHES, world_size)
        if world_size < _MICROBATCHES:
            yield world_size, world_size


def print_times(world_sizes: list[int], steps: int, preset: str) -> None:
    """The times of a step, of the whole training step and of the reduction alone."""
    print(f"n = {steps} steps of each, in turns. Milliseconds: median (quartiles). Ratios: of neighbouring steps.\n")
    print("| step | ranks | microbatches | plain DDP | fixed order | ratio | ratio of CPU time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for work, name in ((Work(preset), f"whole, `{preset}`"), (Work(), "reduction alone, `block94`")):
        for world_size, microbatches in cases(world_sizes):
            plain_steps, fixed_steps = measure(work, microbatches, world_size, steps)
            cells = [name, str(world_size), str(microbatches)]
            cells += [spread([1000 * step.seconds for step in way], 1) for way in (plain_steps, fixed_steps)]
            pairs = list(zip(fixed_steps, plain_steps, strict=True))
            cells.append(spread([a.seconds / b.seconds for a, b in pairs], 2))
            cells.append(spread([a.cpu / b.cpu for a, b in pairs], 2))
            print("| " + " | ".join(cells) + " |", flush=True)


def print_bytes(world_sizes: list[int], steps: int, elements: int | None) -> None:
    """The bytes of a step by the formula and as counted."""
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
    """The formula for up to 1024 ranks."""
    elements = sum(tensor.numel() for tensor in gradients_of_block94())
    print(f"{elements:,} float32 elements, {4 * elements / 1e6:.2f} MB. Of the rank that it costs most, in MB.\n")
    print("| ranks | microbatches | sent | received | ring all-reduce, each | buffers | messages |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for world_size in (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024):
        microbatches = max(_MICROBATCHES, world_size)
        busiest = cost(elements, microbatches, world_size)
        ring = 4 * 2 * elements * (world_size - 1) / world_size
        megabytes = [f"{count / 1e6:.2f}" for count in (busiest.sent, busiest.received, ring, busiest.memory)]
        print(f"| {world_size} | {microbatches} | {' | '.join(megabytes)} | {busiest.messages:,} |")


@answers_bad_input
def main() -> int:
    parser = arguments.parser("reduction", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--bytes", action="store_true", help="count bytes on the wire; needs a network namespace")
    what.add_argument("--table", action="store_true", help="print the formula, without measuring")
    parser.add_argument("--ranks", metavar="N", type=positive, nargs="+", help="default: 1 2 3 4; with --bytes 1 to 8")
    parser.add_argument("--steps", metavar="N", type=positive, help="steps of each way (default: 40; with --bytes 5)")
    parser.add_argument("--preset", default="digits", help="preset whose training steps to time (default: digits)")
    parser.add_argument(
        "--elements",
        metavar="N",
        type=partial(count, least=1, most=999_999_999),
        help="with --bytes: size of the gradients (default: that of block94)",
    )
    args = parser.parse_args()
    if args.table:
        print_table()
        return DONE
    config.load(args.preset, None, [])  # raises UserError
    importlib.import_module("torch._dynamo")  # takes seconds, and would otherwise be imported in every rank
    # in a new process, because an ordinary user may create namespaces only from a process with one thread
    process = _FORK.Process(target=_run, args=(args,))
    process.start()
    process.join()
    return process.exitcode or DONE


def _run(args: argparse.Namespace) -> None:
    try:
        private_network()
    except OSError as error:
        if args.bytes:
            print(f"--bytes needs a network namespace, which this machine refuses: {error}", file=sys.stderr)
            sys.exit(REFUSED)
    if args.bytes:
        print_bytes(args.ranks or list(range(1, 9)), args.steps or 5, args.elements)
    else:
        print_times(args.ranks or [1, 2, 3, 4], args.steps or 40, args.preset)


if __name__ == "__main__":
    sys.exit(main())
