"""The one place that knows ranks: set-up, agreement, and the sum of gradients in a fixed order.

A global batch is a fixed list of K microbatches; a rank runs a contiguous run of them, each as its own
forward and backward pass. Gradients are summed in one fixed binary tree over the microbatches: inside a rank
while it accumulates, across ranks in a DDP communication hook. So the sum does not depend on the number of
ranks (the idea of EasyScale, SC 2023, and VirtualFlow, 2022, made exact).
"""

from __future__ import annotations

import ctypes
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.errors import UserError

T = TypeVar("T")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The contiguous run of `count` items that is this rank's. count: a multiple of the world size."""
        size = count // self.world_size
        return range(self.rank * size, (self.rank + 1) * size)


def allowed_world_sizes(microbatches: int) -> list[int]:
    """World sizes over which a fixed binary tree of that many leaves splits into equal whole branches."""
    return [size for size in range(1, microbatches + 1) if microbatches % size == 0 and not size & (size - 1)]


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun says; (0, 1, 0) when started alone. No communication.

    Raises UserError when only part of the launcher's variables is set."""
    given = [name for name in _LAUNCHER if name in os.environ]
    if not given:
        return 0, 1, 0
    if missing := [name for name in _LAUNCHER if name not in os.environ]:
        raise UserError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start with torchrun, "
            f"or unset all of them"
        )
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in _LAUNCHER[:3])
    except ValueError:
        raise UserError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers; start with torchrun") from None
    return rank, world_size, local_rank


def check_world_size(microbatches: int) -> None:
    """Raises UserError, with the list of those allowed, for a world size that the configuration excludes."""
    world_size = launched_as()[1]
    allowed = allowed_world_sizes(microbatches)
    if world_size not in allowed:
        raise UserError(
            f"train.microbatches = {microbatches} does not split over {world_size} ranks; "
            f"start {' or '.join(map(str, allowed))} of them, or change train.microbatches"
        )


@contextmanager
def ranks(device: str, threads: int, deterministic: bool, timeout: int) -> Iterator[Ranks]:
    """Join the process group for the time of the context: NCCL on GPUs, gloo on CPU.

    device: `auto`, `cpu` or `cuda`. threads: CPU threads of this rank. timeout: seconds after which a
    collective operation that a peer does not join fails. Raises UserError when the device is not there.
    """
    rank, world_size, local_rank = launched_as()
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UserError("train.device = cuda, but torch sees no GPU here; use train.device=cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started a local rank {local_rank}, but this machine has "
                f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node, or use train.device=cpu"
            )
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
    else:
        here = torch.device("cpu")
        _keep_memory()
    torch.set_num_threads(threads)
    _set_arithmetic(deterministic)
    alone = "RANK" not in os.environ
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method="tcp://127.0.0.1:0" if alone else "env://",
        rank=0 if alone else -1,
        world_size=1 if alone else -1,
        timeout=timedelta(seconds=timeout),
        device_id=here if kind == "cuda" else None,
    )
    try:
        yield Ranks(rank, world_size, local_rank, here)
    finally:
        dist.destroy_process_group()


def _keep_memory() -> None:
    """Have glibc keep freed memory: pages of large activations are else faulted in anew at every layer."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return
    settings = {-4: 0, -1: 2**31 - 1, -2: 512 << 20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for parameter, value in settings.items():
        libc.mallopt(parameter, value)


def _set_arithmetic(deterministic: bool) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Only warn of a kernel that has no deterministic form: max_pool2d's backward is listed as one on CUDA, but
    # windows that do not overlap, as here, give each input at most one addend.
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    warnings.filterwarnings("ignore", "max_pool2d_with_indices_backward_cuda does not have a deterministic")
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on rank 0 only and give every rank its (picklable) result, or its error of the user."""
    answer: list[Any] = [None, None]
    if ranks.main:
        try:
            answer[0] = work()
        except (UserError, ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=ranks.device)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def gather_rows(ranks: Ranks, rows: Tensor) -> Tensor:
    """Put together what every rank knows of its share: (n, ...) on each becomes (world size * n, ...) on all,
    in rank order."""
    if ranks.world_size == 1:
        return rows
    mine = rows.contiguous()
    everyone = mine.new_empty((ranks.world_size * len(mine), *mine.shape[1:]))
    dist.all_gather_into_tensor(everyone, mine)
    return everyone


def sum_integers(ranks: Ranks, counts: Tensor) -> Tensor:
    """Sum an int64 tensor over the ranks; exact, so the order is of no matter."""
    if ranks.world_size > 1:
        dist.all_reduce(counts)
    return counts


def tree_sum(parts: list[Tensor]) -> Tensor:
    """Add tensors pairwise, neighbours first, then neighbouring sums. len(parts): a power of two."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class FixedOrderSum:
    """Leaves in every parameter's `grad` the sum over all microbatches of all ranks, in the fixed tree.

    Wraps the network in DDP. Run each of this rank's microbatches under `leaf`; after the last one the sum is
    there. Across ranks each one adds up its own slice of the gradient, which moves the bytes of a ring
    all-reduce.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, microbatches: int) -> None:
        """microbatches: K, those of a global batch."""
        self.world_size = ranks.world_size
        self.leaves = len(ranks.share(microbatches))
        # each rank owns the BatchNorm rows of its microbatches; torch renamed the option
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_sync_of_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        self.ddp = DistributedDataParallel(
            model,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **no_sync_of_buffers,
        )
        self.ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.position = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self.partial: list[list[Tensor]] = []  # sums of whole branches of the tree, larger ones first

    @contextmanager
    def leaf(self, index: int) -> Iterator[None]:
        """Around the forward and backward pass of this rank's microbatch number `index`, counted from 0."""
        last = index == self.leaves - 1
        if index == 0:
            self.partial.clear()
            self.ddp.zero_grad(set_to_none=True)
        with nullcontext() if last else self.ddp.no_sync():
            yield
        if not last:
            grads = []
            for parameter in self.parameters:
                if parameter.grad is None:
                    raise RuntimeError("a parameter took no part in the loss")
                grads.append(parameter.grad)
                parameter.grad = None
            done = index + 1
            while done % 2 == 0:  # like a binary counter: two branches of one size make one of the next
                torch._foreach_add_(grads, self.partial.pop())
                done //= 2
            self.partial.append(grads)

    def _reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        flat, parameters = bucket.buffer(), bucket.parameters()
        mine = [self.position[id(parameter)] for parameter in parameters]
        # bucket.gradients() takes every gradient for contiguous, but the bucket keeps the parameters' layout
        slices = flat.split([parameter.numel() for parameter in parameters])
        grads = [part.as_strided(p.shape, p.stride()) for p, part in zip(parameters, slices, strict=True)]
        for branch in reversed(self.partial):
            torch._foreach_add_(grads, [branch[index] for index in mine])
        devices = [flat.device] if flat.is_cuda else None
        total: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        total.set_result(self._sum_over_ranks(flat))
        return total

    def _sum_over_ranks(self, flat: Tensor) -> Tensor:
        size = self.world_size
        if size == 1:
            return flat
        padded = nn.functional.pad(flat, (0, -len(flat) % size))
        parts = torch.empty_like(padded)
        dist.all_to_all_single(parts, padded)
        dist.all_gather_into_tensor(padded, tree_sum(list(parts.chunk(size))))
        return padded[: len(flat)]
