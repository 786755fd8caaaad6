"""Ranks: their process group, the share of work of each, and collective operations."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend `fake`
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dist_train.distributed.device import (
    Place,
    check_places,
    choose_place,
    keep_memory,
    muted_stdout,
    of_device,
    set_arithmetic,
)
from dist_train.distributed.heartbeat import Heartbeat
from dist_train.distributed.launcher import launched_as, meet_on_this_machine, wait_for_store
from dist_train.errors import DeviceError, LostPeerError, UserError, cause, first_line, needs_memory
from dist_train.signals import stop_with_launcher

T = TypeVar("T")


def share(count: int, rank: int, world_size: int) -> range:
    """The contiguous range of `count` items that a rank has; the ranks' ranges differ by at most one in length."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. wire: the device of the tensors that the process group exchanges."""

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
        """The contiguous range of `count` items that this rank has."""
        return share(count, self.rank, self.world_size)

    @contextmanager
    def exchange(self, queued: bool = False) -> Iterator[None]:
        """A context around a collective operation and the host's wait for it, in which a peer that does not take part
        is detected.

        On the wire of a GPU the operation itself only queues work, and so the context ends by waiting for the GPU. With
        `queued` it does not, and this rank counts as waiting until its next exchange: whatever it does with the GPU may
        block before that."""
        if self.heartbeat is None:
            yield
            return
        on_gpu = self.wire.type == "cuda"
        with self.heartbeat.exchange(queued and on_gpu):
            yield
            if on_gpu and not queued:
                torch.cuda.current_stream(self.wire).synchronize()

    def begin(self, step: int) -> None:
        """Set the step in this rank's heartbeats. step: the one now computed, counted from 1."""
        if self.heartbeat:
            self.heartbeat.step = step


@contextmanager
def join_ranks(
    device: str, threads: int, deterministic: bool, timeout: int, backend: str = "auto", first_timeout: int = 0
) -> Iterator[Ranks]:
    """Join the process group for the duration of the context.

    device: `auto`, `cpu` or `cuda`. threads: CPU threads of this rank. timeout: seconds after which a rank that
    does not take part in an exchange counts as lost. backend: `auto` takes NCCL on GPUs, gloo on CPUs; with `gloo`
    several ranks can share a GPU. first_timeout: seconds to wait for all ranks to join, where longer than `timeout`.
    Raises UserError, on all ranks, when a rank has no such device or that of another; LostPeerError when a peer does
    not join, fails or is lost; DeviceError when this rank's GPU fails.
    """
    rank, world_size, local_rank = launched_as()
    share_gpus = backend == "gloo"
    place = choose_place(device, local_rank, share_gpus)
    torch.set_num_threads(threads)
    set_arithmetic(deterministic)
    stop_with_launcher()
    alone = world_size == 1
    try:
        # longer than the heartbeat's timeout, whose message names the lost rank
        group_timeout = timedelta(seconds=timeout + 30)
        join_timeout = max(group_timeout, timedelta(seconds=first_timeout))
        # Alone there is nobody to meet: a store in memory, and a group that sends nothing, since DDP requires one.
        # Torch's others listen for connections, the store on all addresses and from anyone.
        if alone:
            store: Store = HashStore()
        else:
            meet_on_this_machine()
            wait_for_store(rank, join_timeout.total_seconds())
            store, *_ = next(rendezvous("env://", rank, world_size, timeout=join_timeout))
        start = _agree_on_start(store, rank, world_size, join_timeout)
        check_places(_exchange_places(PrefixStore(start, store), rank, world_size, place), share_gpus)
        if backend == "auto":
            backend = "nccl" if place.gpu else "gloo"
        if backend == "nccl" and not place.gpu:
            raise UserError("train.backend = nccl works between GPUs only; use train.backend=gloo, or auto")
        if not place.gpu:
            keep_memory()
        with muted_stdout():
            dist.init_process_group(
                "fake" if alone else backend,
                store=PrefixStore(start, store),
                rank=rank,
                world_size=world_size,
                timeout=group_timeout,
                device_id=place.device if backend == "nccl" and not alone else None,
            )
        heartbeat = None if alone else Heartbeat(rank, world_size, timeout, start)
    except RuntimeError as error:
        if needs_memory(error):
            raise
        if of_device(error):
            raise _device_error(error, rank, place) from error
        others = f"{world_size - 1} ranks" if world_size > 2 else "rank"
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostPeerError(f"rank {rank} did not find the other {others} at {address}: {cause(error)}") from error
    try:
        wire = place.device if backend == "nccl" else torch.device("cpu")
        yield Ranks(rank, world_size, place.device, wire, heartbeat)
    except BaseException as error:
        own = needs_memory(error) or of_device(error)  # nobody else has caused it
        lost = heartbeat.lost(error) if heartbeat and isinstance(error, RuntimeError) and not own else None
        if heartbeat and lost:
            heartbeat.leave()
            raise lost from error
        if heartbeat:
            heartbeat.close(f"{type(error).__name__}: {error}".splitlines()[0])
        if of_device(error):
            raise _device_error(error, rank, place) from error
        raise
    if heartbeat:
        heartbeat.close()
    dist.destroy_process_group()


def _device_error(error: BaseException, rank: int, place: Place) -> DeviceError:
    where = f"{place}, {place.identity}" if place.identity else str(place)
    return DeviceError(
        f"rank {rank}: {first_line(error)} ({where}); start the same command again, without this device where that "
        f"happens again"
    )


def _agree_on_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Wait for all ranks, and return a name of this start of theirs, the prefix of all that they store.

    A launcher's store outlives a restart of its ranks, with the addresses of the earlier ones, and the launchers of
    several hosts may disagree on the number of restarts. So rank 0 chooses the name, and answers each rank that reads
    it; one that has read the name of an earlier start is not answered, and reads again. Raises RuntimeError when a rank
    does not come."""
    own = start = uuid.uuid4().hex
    if rank == 0:
        store.set("start", start)
        peers = [f"{start}/{peer}" for peer in range(1, world_size)]
        store.wait(peers, timeout)
        for peer in peers:
            store.set(f"{start}/{store.get(peer).decode()}", "here")
        return start
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", own)
        if store.check([f"{start}/{own}"]):
            return start
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 did not answer within {timeout.total_seconds():g} s")


def _exchange_places(store: Store, rank: int, world_size: int, own: Place) -> list[Place]:
    """The place of every rank, in order. Rank 0 gathers them, so that the others read once. Raises RuntimeError when a
    rank does not answer."""
    peers = range(1, world_size)
    if rank == 0:
        places = [asdict(own), *(json.loads(store.get(f"place/{peer}")) for peer in peers)]
        store.set("places", json.dumps(places))
        for peer in peers:  # where a launcher holds no store it ends with this rank
            store.get(f"seen/{peer}")
    else:
        store.set(f"place/{rank}", json.dumps(asdict(own)))
        places = json.loads(store.get("places"))
        store.set(f"seen/{rank}", "")
    return [Place(**place) for place in places]


def on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only, and return its (picklable) result on every rank. A UserError, ValueError or OSError is
    raised on every rank."""
    if ranks.world_size == 1:
        return work()
    result_and_error: list[Any] = [None, None]
    if ranks.main:
        try:
            result_and_error[0] = work()
        except (UserError, ValueError, OSError) as error:
            result_and_error[1] = error
    with ranks.exchange():
        dist.broadcast_object_list(result_and_error, src=0, device=ranks.wire)
    if result_and_error[1] is not None:
        raise result_and_error[1]
    result: T = result_and_error[0]
    return result


def gather_objects(ranks: Ranks, own: T) -> list[T]:
    """A (picklable) object of every rank, in order, on all ranks."""
    everyone = [own] * ranks.world_size
    if ranks.world_size > 1:
        with ranks.exchange():
            dist.all_gather_object(everyone, own)
    return everyone


def gather_shares(ranks: Ranks, own: Tensor, count: int) -> Tensor:
    """Gather every rank's share of `count` items: `own`, (share, ...) of any dtype, to (count, ...) on all ranks, in
    order, on the device of `own`."""
    if ranks.world_size == 1:
        return own
    sizes = [len(share(count, rank, ranks.world_size)) for rank in range(ranks.world_size)]
    padded = own.new_zeros(max(sizes), *own.shape[1:], device=ranks.wire)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    with ranks.exchange():
        # not all_gather_into_tensor: torch 2.14 deprecates it, and its replacement is new in 2.14
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(own.device)


def sum_integers(ranks: Ranks, counts: Tensor) -> Tensor:
    """Sum a tensor of integers over the ranks: the same shape and dtype, on `ranks.wire` unless there is one rank.
    Integer sums are exact, so their order does not matter."""
    if ranks.world_size == 1:
        return counts
    counts = counts.to(ranks.wire)
    with ranks.exchange():
        dist.all_reduce(counts)
    return counts
