"""The sum of gradients in a fixed order, whatever the number of ranks.

A global batch is a fixed list of K microbatches; a rank has a contiguous range of them, each with its own
forward and backward pass. Their gradients are summed in one fixed binary tree over the microbatches: inside a
rank while it accumulates, across ranks in a DDP communication hook. So the sum does not depend on the number of
ranks (the idea of EasyScale, SC 2023, and VirtualFlow, 2022, made exact).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.distributed.ranks import Ranks, share

T = TypeVar("T")


class Subtrees(Generic[T]):
    """Sums of whole subtrees of the fixed binary tree over `count` leaves, which are pushed from left to right.

    The node (level, index) is the sum of up to 2**level leaves, from leaf index * 2**level: its left half plus its
    right half. `nodes` holds (level, index, sum) of the largest nodes that are complete.
    """

    def __init__(self, count: int, add: Callable[[T, T], T]) -> None:
        self.count, self.add = count, add
        self.depth = (count - 1).bit_length()
        self.nodes: list[tuple[int, int, T]] = []

    def push(self, level: int, index: int, value: T) -> None:
        """Add the next node, and every node that it completes."""
        while level < self.depth:
            if index % 2:
                if not self.nodes or self.nodes[-1][:2] != (level, index - 1):
                    break  # the left half belongs to another rank
                value = self.add(self.nodes.pop()[2], value)
            elif (index + 1) << level < self.count:
                break  # the right half is not there yet
            level, index = level + 1, index // 2
        self.nodes.append((level, index, value))


def pieces(leaves: range, count: int) -> list[tuple[int, int]]:
    """(level, index) of the fewest whole subtrees that make up the contiguous `leaves` of a tree over `count`."""
    subtrees: Subtrees[None] = Subtrees(count, lambda left, right: None)
    for leaf in leaves:
        subtrees.push(0, leaf, None)
    return [(level, index) for level, index, _ in subtrees.nodes]


@dataclass(frozen=True)
class Cost:
    """The cost of one reduction for the rank with the highest. sent, received: bytes on the wire. memory: bytes of
    buffers besides the gradient itself. messages: the number that a rank sends."""

    sent: int
    received: int
    memory: int
    messages: int


def cost(elements: int, microbatches: int, world_size: int) -> Cost:
    """The cost of summing the float32 gradients of `elements` weights, in one bucket.

    A rank whose share is p whole subtrees sends p slices of ceil(elements / world size) to each other rank, and
    then the sum of its own slice: p = 1 gives the bytes of a ring all-reduce.
    """
    shares = [share(microbatches, rank, world_size) for rank in range(world_size)]
    subtrees = [len(pieces(leaves, microbatches)) for leaves in shares]
    part, peers, most = 4 * -(-elements // world_size), world_size - 1, max(subtrees)
    waiting = max(len(pieces(leaves[:n], microbatches)) for leaves in shares for n in range(len(leaves)))
    buffers = (most - 1) * 4 * elements + sum(subtrees) * part if peers else 0
    return Cost(
        sent=(most + 1) * peers * part,
        received=(sum(subtrees) - min(subtrees) + peers) * part if peers else 0,
        memory=waiting * 4 * elements + buffers,
        messages=(most + 1) * peers,
    )


class MicrobatchGradient:
    """Properties of one microbatch's own gradient, known after its backward pass."""

    def __init__(self) -> None:
        self._largest: Tensor | None = None

    @property
    def largest(self) -> Tensor:
        """The largest magnitude, a scalar on the device; NaN if the gradient has one. Raises RuntimeError before the
        backward pass."""
        if self._largest is None:
            raise RuntimeError("the backward pass of this microbatch has not run")
        return self._largest

    def add(self, largest: Tensor) -> None:
        """Include a part of the gradient. largest: that part's largest magnitude, a scalar."""
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)


class FixedOrderSum:
    """Leaves in every parameter's `grad` the sum over all microbatches of all ranks, in the fixed tree.

    Run each of this rank's microbatches on `wrap()`, the network in DDP, under `microbatch`; or compute their gradients
    in another way, and `add` them. After the last one the sum is complete. Each rank sums one slice of the gradient
    over all ranks, and sends that sum to its peers.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, microbatches: int) -> None:
        """model: with the same weights on all ranks. microbatches: K, the number in a global batch."""
        self.ranks, self.model, self.microbatches = ranks, model, microbatches
        self.slots = ranks.share(microbatches)
        self.pieces = [pieces(share(microbatches, r, ranks.world_size), microbatches) for r in range(ranks.world_size)]
        self.gradient = MicrobatchGradient()
        self.exchanges: list[_BucketExchange] = []
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.position = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self.sums = self._subtrees()
        self.ddp: DistributedDataParallel | None = None
        self.flat: Tensor | None = None  # the sum of gradients that were computed without DDP

    def wrap(self) -> DistributedDataParallel:
        """The network in DDP, made at the first call. CUDA graphs of its backward pass cannot be recorded after that:
        DDP keeps nodes of autograd, whose stream is that in which it was made."""
        if self.ddp is None:
            # no broadcast of buffers: each rank owns the BatchNorm rows of its microbatches; later torch renamed the
            # option
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            no_broadcast: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self.ddp = DistributedDataParallel(
                self.model,
                device_ids=[self.ranks.device] if self.ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                init_sync=False,
                **no_broadcast,
            )
            self.ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        return self.ddp

    @contextmanager
    def microbatch(self, index: int) -> Iterator[MicrobatchGradient]:
        """A context around the forward and backward pass of this rank's microbatch number `index`, counted from 0.
        The MicrobatchGradient that it yields is complete after the backward pass."""
        ddp, last = self.wrap(), index == len(self.slots) - 1
        if index == 0:
            self.sums = self._subtrees()
            ddp.zero_grad(set_to_none=True)
        self.gradient = gradient = MicrobatchGradient()
        with nullcontext() if last else ddp.no_sync():
            yield gradient
        if not last:
            grads = []
            for parameter in self.parameters:
                if parameter.grad is None:
                    raise RuntimeError("a parameter took no part in the loss")
                grads.append(parameter.grad)
                parameter.grad = None
            gradient.add(largest(grads))
            self.sums.push(0, self.slots[index], grads)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a gradient, (numbers of all parameters,), in the shapes and strides of the parameters."""
        return _views(flat, self.parameters)

    def add(self, index: int, gradient: Tensor) -> None:
        """Add the gradient of this rank's microbatch number `index`, (numbers of all parameters,) float32, which was
        computed without DDP, and which this overwrites. After that of the last microbatch the sum is complete."""
        if index == 0:
            self.sums = self._subtrees()
        self.sums.push(0, self.slots[index], [gradient])
        if index < len(self.slots) - 1:
            return
        rows = [row for _, _, (row,) in self.sums.nodes]
        if self.ranks.world_size > 1:
            total: torch.futures.Future[Tensor] = torch.futures.Future(devices=_devices(gradient))
            self.exchanges.append(_BucketExchange(self.ranks, self.pieces, rows, total))
            self._finish()
        if self.flat is None:
            self.flat = torch.empty_like(gradient)
            for parameter, part in zip(self.parameters, self.views(self.flat), strict=True):
                parameter.grad = part
        self.flat.copy_(rows[-1])

    def _subtrees(self) -> Subtrees[list[Tensor]]:
        return Subtrees(self.microbatches, _add_to_right)

    def _reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        flat, parameters = bucket.buffer(), bucket.parameters()
        self.gradient.add(largest([flat]))
        positions = [self.position[id(parameter)] for parameter in parameters]
        subtrees = self._subtrees()
        subtrees.nodes = [(level, node, [sums[i] for i in positions]) for level, node, sums in self.sums.nodes]
        subtrees.push(0, self.slots[-1], _views(flat, parameters))  # the last piece is summed in place, in `flat`
        rows = [torch.empty_like(flat) for _ in subtrees.nodes[:-1]]
        for row, (_, _, sums) in zip(rows, subtrees.nodes, strict=False):
            torch._foreach_copy_(_views(row, parameters), sums)
        total: torch.futures.Future[Tensor] = torch.futures.Future(devices=_devices(flat))
        if self.ranks.world_size == 1:
            total.set_result(flat)
            return total
        self.exchanges.append(_BucketExchange(self.ranks, self.pieces, [*rows, flat], total))
        if bucket.is_last():
            self._finish()
        return total

    def _finish(self) -> None:
        """Sum this rank's slice of every bucket, and exchange the sums."""
        exchanges, self.exchanges = self.exchanges, []
        with self.ranks.exchange(queued=True):
            for bucket in exchanges:
                bucket.sum(self.microbatches)
            works = [work for bucket in exchanges for work in bucket.send_sums()]
            for work in works:
                work.wait()
        for bucket in exchanges:
            bucket.done()


class _BucketExchange:
    """A bucket whose slices are sent to the ranks that sum them, while the backward pass continues."""

    def __init__(
        self, ranks: Ranks, pieces: list[list[tuple[int, int]]], rows: list[Tensor], total: torch.futures.Future[Tensor]
    ) -> None:
        """rows: this rank's pieces, flat; the last of them is DDP's bucket. total: `done` sets it to that bucket."""
        self.pieces, self.bucket, self.total = pieces, rows[-1], total
        self.rows = [row.to(ranks.wire) for row in rows]
        part = -(-len(self.bucket) // ranks.world_size)
        self.slices = [slice(rank * part, (rank + 1) * part) for rank in range(ranks.world_size)]
        self.own_slice = self.rows[-1][self.slices[ranks.rank]]
        self.peers = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self.received = {
            rank: self.own_slice.new_empty(len(pieces[rank]), len(self.own_slice)).unbind() for rank in self.peers
        }
        self.works = _swap(
            [(peer, row[self.slices[peer]]) for peer in self.peers for row in self.rows],
            [(peer, row) for peer in self.peers for row in self.received[peer]],
        )

    def sum(self, microbatches: int) -> None:
        """Sum this rank's slice in the fixed tree, once the pieces of all ranks have arrived."""
        for work in self.works:
            work.wait()
        subtrees: Subtrees[Tensor] = Subtrees(microbatches, lambda left, right: right.add_(left))
        for rank, nodes in enumerate(self.pieces):
            slices = self.received.get(rank) or [row[self.slices[rank]] for row in self.rows]
            for (level, index), row in zip(nodes, slices, strict=True):
                subtrees.push(level, index, row)
        ((_, _, total),) = subtrees.nodes
        self.own_slice.copy_(total)

    def send_sums(self) -> list[dist.Work]:
        """Begin to send this rank's sum to its peers, and to receive theirs."""
        whole = self.rows[-1]
        return _swap(
            [(peer, self.own_slice) for peer in self.peers], [(peer, whole[self.slices[peer]]) for peer in self.peers]
        )

    def done(self) -> None:
        """Complete DDP's bucket, once all sums have arrived."""
        if self.rows[-1].device != self.bucket.device:
            self.bucket.copy_(self.rows[-1])
        self.total.set_result(self.bucket)


def _swap(outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]]) -> list[dist.Work]:
    """Begin to send and receive (peer, tensor) pairs directly: gloo's all_gather is slower for the same bytes."""
    sends = [dist.P2POp(dist.isend, tensor, peer) for peer, tensor in outgoing if len(tensor)]
    receives = [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in incoming if len(tensor)]
    works: list[dist.Work] = dist.batch_isend_irecv([*sends, *receives]) if sends or receives else []
    return works


def _devices(tensor: Tensor) -> list[int | str | torch.device] | None:
    """The devices of a future of a tensor."""
    return [tensor.device] if tensor.is_cuda else None


def largest(gradients: list[Tensor]) -> Tensor:
    """The largest magnitude, a scalar on the device; NaN if there is one."""
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, torch.inf)).max()
    # on a CPU the norm, or a view that is not contiguous, would take twenty times as long
    low, high = zip(*(torch.aminmax(g.as_strided((g.numel(),), (1,))) for g in gradients), strict=True)
    return torch.maximum(torch.stack(high).max(), -torch.stack(low).min())


def _add_to_right(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(right, left)
    return right


def _views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A bucket's content as tensors of its parameters' shapes and strides; bucket.gradients() would wrongly treat
    every gradient as contiguous."""
    slices = flat.split([parameter.numel() for parameter in parameters])
    return [part.as_strided(p.shape, p.stride()) for p, part in zip(parameters, slices, strict=True)]
