"""Ranks: how they are set up, what each one's share is, and how they exchange what they know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dist_train.distributed.device import choose_device, keep_memory, muted_stdout, set_arithmetic
from dist_train.distributed.heartbeat import Heartbeat
from dist_train.distributed.launcher import launched_as
from dist_train.errors import LostPeerError, UserError
from dist_train.signals import stop_with_launcher

T = TypeVar("T")


def share(count: int, rank: int, world_size: int) -> range:
    """The contiguous run of `count` items that is a rank's: all of them once, as even as can be."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. wire: the device whose tensors the process group takes."""

    rank: int
    world_size: int
    device: torch.device
    wire: torch.device
    heartbeat: Heartbeat | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The contiguous run of `count` items that is this rank's."""
        return share(count, self.rank, self.world_size)

    def exchange(self) -> AbstractContextManager[None]:
        """Around a collective operation, so that a peer that does not take part is noticed."""
        return self.heartbeat.exchange() if self.heartbeat else nullcontext()

    def begin(self, step: int) -> None:
        """Say which step, counted from 1, is computed from now on."""
        if self.heartbeat:
            self.heartbeat.step = step


@contextmanager
def join_ranks(
    device: str, threads: int, deterministic: bool, timeout: int, backend: str = "auto", first_timeout: int = 0
) -> Iterator[Ranks]:
    """Join the process group for the time of the context.

    device: `auto`, `cpu` or `cuda`. threads: CPU threads of this rank. timeout: seconds after which a rank that
    is waited for counts as lost. backend: `auto` takes NCCL on GPUs, gloo on CPUs; with `gloo` several ranks can
    share a GPU. first_timeout: seconds to wait for the others to come, where that is longer. Raises UserError when
    the device is not there, LostPeerError when a peer does not come or goes.
    """
    rank, world_size, local_rank = launched_as()
    here = choose_device(device, local_rank, share_gpus=backend == "gloo")
    if backend == "auto":
        backend = "nccl" if here.type == "cuda" else "gloo"
    if backend == "nccl" and here.type == "cpu":
        raise UserError("train.backend = nccl works between GPUs only; use train.backend=gloo, or auto")
    if here.type == "cuda":
        torch.cuda.set_device(here)
    else:
        keep_memory()
    torch.set_num_threads(threads)
    set_arithmetic(deterministic)
    stop_with_launcher()
    alone = "RANK" not in os.environ
    try:
        # longer than the heartbeat's, which names the rank that is lost
        patience = timedelta(seconds=timeout + 30)
        coming = max(patience, timedelta(seconds=first_timeout))
        where = "tcp://127.0.0.1:0" if alone else "env://"
        store, *_ = next(rendezvous(where, rank, world_size, timeout=coming))
        store.set(f"here/{rank}", b"")
        store.wait([f"here/{each}" for each in range(world_size)], coming)
        with muted_stdout():
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=patience,
                device_id=here if backend == "nccl" else None,
            )
        heartbeat = Heartbeat(rank, world_size, timeout) if world_size > 1 else None
    except RuntimeError as error:
        raise LostPeerError(
            f"rank {rank} did not find the other {world_size - 1} ranks at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield Ranks(rank, world_size, here, here if backend == "nccl" else torch.device("cpu"), heartbeat)
    except BaseException as error:
        lost = heartbeat.lost(error) if heartbeat and isinstance(error, RuntimeError) else None
        if heartbeat and lost:
            heartbeat.leave()
            raise lost from error
        if heartbeat:
            heartbeat.close(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    if heartbeat:
        heartbeat.close()
    dist.destroy_process_group()


def on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on rank 0 only and give every rank its (picklable) result, or its error of the user."""
    answer: list[Any] = [None, None]
    if ranks.main:
        try:
            answer[0] = work()
        except (UserError, ValueError, OSError) as error:
            answer[1] = error
    with ranks.exchange():
        dist.broadcast_object_list(answer, src=0, device=ranks.wire)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def gather_shares(ranks: Ranks, mine: Tensor, count: int) -> Tensor:
    """Put together what every rank knows of its share of `count` items: (share, ...) on each becomes (count, ...)
    on all, in order."""
    if ranks.world_size == 1:
        return mine
    sizes = [len(share(count, rank, ranks.world_size)) for rank in range(ranks.world_size)]
    padded = mine.new_zeros(max(sizes), *mine.shape[1:], device=ranks.wire)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    with ranks.exchange():
        # not all_gather_into_tensor, which torch 2.14 calls deprecated; what it names instead came with 2.14
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(mine.device)


def sum_integers(ranks: Ranks, counts: Tensor) -> Tensor:
    """Sum an int64 tensor over the ranks; exact, so the order is of no matter."""
    if ranks.world_size == 1:
        return counts
    counts = counts.to(ranks.wire)
    with ranks.exchange():
        dist.all_reduce(counts)
    return counts
