"""The sum of gradients in a fixed order, whatever the number of ranks.

A global batch is a fixed list of K microbatches; a rank runs a contiguous run of them, each as its own
forward and backward pass. Their gradients are summed in one fixed binary tree over the microbatches: inside a
rank while it accumulates, across ranks in a DDP communication hook. So the sum does not depend on the number of
ranks (the idea of EasyScale, SC 2023, and VirtualFlow, 2022, made exact).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.distributed import Ranks, share

T = TypeVar("T")


class Branches(Generic[T]):
    """Sums of whole branches of the fixed binary tree over `count` leaves, which come from left to right.

    The node (level, index) sums the leaves from index * 2**level on, 2**level of them or as many as there are:
    its left half plus its right half. `nodes` holds (level, index, sum) of the largest nodes that are complete.
    """

    def __init__(self, count: int, add: Callable[[T, T], T]) -> None:
        self.count, self.add = count, add
        self.depth = (count - 1).bit_length()
        self.nodes: list[tuple[int, int, T]] = []

    def push(self, level: int, index: int, value: T) -> None:
        """Take up the next node, and every node that it completes."""
        while level < self.depth:
            if index % 2:
                if not self.nodes or self.nodes[-1][:2] != (level, index - 1):
                    break  # the left half is another rank's
                value = self.add(self.nodes.pop()[2], value)
            elif (index + 1) << level < self.count:
                break  # there is a right half, still to come
            level, index = level + 1, index // 2
        self.nodes.append((level, index, value))


def pieces(leaves: range, count: int) -> list[tuple[int, int]]:
    """(level, index) of the fewest whole branches that make up the contiguous `leaves` of a tree over `count`."""
    branches: Branches[None] = Branches(count, lambda left, right: None)
    for leaf in leaves:
        branches.push(0, leaf, None)
    return [(level, index) for level, index, _ in branches.nodes]


@dataclass(frozen=True)
class Cost:
    """What one reduction costs the rank that it costs most. sent, received: bytes on the wire. memory: bytes of
    buffers beside the gradient itself. messages: those that a rank sends."""

    sent: int
    received: int
    memory: int
    messages: int


def cost(elements: int, microbatches: int, world_size: int) -> Cost:
    """The cost of summing float32 gradients of that many elements, in one bucket.

    A rank whose share is p whole branches sends p slices of ceil(elements / world size) to each other rank, and
    its sum of a slice in the ring of an all-gather: p = 1 gives the bytes of a ring all-reduce.
    """
    shares = [share(microbatches, rank, world_size) for rank in range(world_size)]
    branches = [len(pieces(leaves, microbatches)) for leaves in shares]
    part = 4 * -(-elements // world_size)
    peers = world_size - 1
    most = max(branches)
    waiting = max(len(pieces(leaves[:n], microbatches)) for leaves in shares for n in range(1, len(leaves) + 1))
    copied = most * world_size * part if most > 1 or elements % world_size else 0
    return Cost(
        sent=(most + 1) * peers * part,
        received=(sum(branches) - min(branches) + peers) * part if peers else 0,
        memory=waiting * 4 * elements + (copied + sum(branches) * part if peers else 0),
        messages=2 * peers,
    )


class FixedOrderSum:
    """Leaves in every parameter's `grad` the sum over all microbatches of all ranks, in the fixed tree.

    Wraps the network in DDP. Run each of this rank's microbatches under `leaf`; after the last one the sum is
    there. Across ranks each one adds up its own slice of the gradient.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, microbatches: int) -> None:
        """microbatches: K, those of a global batch."""
        self.ranks, self.microbatches = ranks, microbatches
        self.slots = ranks.share(microbatches)
        self.pieces = [pieces(share(microbatches, r, ranks.world_size), microbatches) for r in range(ranks.world_size)]
        self.largest: Tensor | None = None
        # each rank owns the BatchNorm rows of its microbatches; torch renamed the option
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_sync_of_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        with ranks.exchange():
            self.ddp = DistributedDataParallel(
                model,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **no_sync_of_buffers,
            )
        self.ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.position = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self.sums = self._branches()

    @contextmanager
    def leaf(self, index: int) -> Iterator[None]:
        """Around the forward and backward pass of this rank's microbatch number `index`, counted from 0. After
        it `largest` is the largest magnitude in that microbatch's own gradient, NaN when it holds one."""
        last = index == len(self.slots) - 1
        if index == 0:
            self.sums = self._branches()
            self.ddp.zero_grad(set_to_none=True)
        self.largest = None
        with nullcontext() if last else self.ddp.no_sync():
            yield
        if not last:
            grads = []
            for parameter in self.parameters:
                if parameter.grad is None:
                    raise RuntimeError("a parameter took no part in the loss")
                grads.append(parameter.grad)
                parameter.grad = None
            self.largest = torch.stack(torch._foreach_norm(grads, torch.inf)).max()
            self.sums.push(0, self.slots[index], grads)

    def _branches(self) -> Branches[list[Tensor]]:
        return Branches(self.microbatches, _add_to_right)

    def _reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        flat, parameters = bucket.buffer(), bucket.parameters()
        largest = torch.linalg.vector_norm(flat, torch.inf)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        mine = [self.position[id(parameter)] for parameter in parameters]
        branches = self._branches()
        branches.nodes = [(level, node, [sums[i] for i in mine]) for level, node, sums in self.sums.nodes]
        branches.push(0, self.slots[-1], _views(flat, parameters))  # sums end up in `flat`, the last piece
        devices = [flat.device] if flat.is_cuda else None
        total: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        total.set_result(self._sum_over_ranks(flat, parameters, [sums for _, _, sums in branches.nodes[:-1]]))
        return total

    def _sum_over_ranks(self, flat: Tensor, parameters: list[Tensor], before: list[list[Tensor]]) -> Tensor:
        """flat: the last of this rank's pieces, as DDP's bucket. before: those left of it. Returns the whole sum."""
        size = self.ranks.world_size
        if size == 1:
            return flat
        part, wire = -(-len(flat) // size), self.ranks.wire
        if before or len(flat) % size or flat.device != wire:
            padded = flat.new_zeros(len(before) + 1, size * part)
            for row, sums in zip(padded, before, strict=False):
                torch._foreach_copy_(_views(row, parameters), sums)
            padded[-1, : len(flat)] = flat
            outgoing = padded.view(-1, size, part).transpose(0, 1).to(wire).contiguous()
            whole = outgoing.new_empty(size * part)
        else:  # nothing to copy: sent from the bucket, and received in it
            outgoing = whole = flat
        counts = [len(nodes) for nodes in self.pieces]
        incoming = outgoing.new_empty(sum(counts), part)
        branches: Branches[Tensor] = Branches(self.microbatches, lambda left, right: right.add_(left))
        with self.ranks.exchange():
            dist.all_to_all_single(
                incoming.view(-1),
                outgoing.view(-1),
                [count * part for count in counts],
                [counts[self.ranks.rank] * part] * size,
            )
            for (level, index), row in zip((node for nodes in self.pieces for node in nodes), incoming, strict=True):
                branches.push(level, index, row)
            ((_, _, mine),) = branches.nodes
            dist.all_gather_into_tensor(whole, mine)
        return whole[: len(flat)].to(flat.device)


def _add_to_right(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(right, left)
    return right


def _views(flat: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """A bucket's content as tensors of its parameters' shapes. bucket.gradients() takes every gradient for
    contiguous, but the bucket keeps the parameters' layout."""
    slices = flat[: sum(parameter.numel() for parameter in parameters)].split([p.numel() for p in parameters])
    return [part.as_strided(p.shape, p.stride()) for p, part in zip(parameters, slices, strict=True)]
