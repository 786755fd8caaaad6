"""The device of a rank, its arithmetic and its speed."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dist_train.errors import UserError, first_line, needs_memory
from dist_train.signals import libc


def autocast(device: torch.device, precision: str, cache: bool = True) -> torch.autocast:
    """The autocast context of a forward pass. precision: `bf16`, `fp16` or `fp32`, which disables it. cache: whether
    the outermost context casts each weight once."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=cache)


@contextmanager
def muted_stdout() -> Iterator[None]:
    """Discard what is written to stdout, also by C++: the gloo of torch 2.9 prints its number of peers there, and has
    no setting against it."""
    try:
        stdout = os.dup(1)
    except OSError:  # stdout is closed
        yield
        return
    try:
        sys.stdout.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@dataclass(frozen=True)
class Place:
    """Where a rank computes, as its peers are told. index: of its GPU among those that it sees. gpu: the GPU's name, ""
    for a CPU. identity: what no other GPU of the host has. error: why the rank has no device, "" where it has one."""

    host: str
    index: int = 0
    gpu: str = ""
    identity: str = ""
    error: str = ""

    def __str__(self) -> str:
        return f"{f'{self.gpu}, cuda:{self.index}' if self.gpu else 'CPU'} of {self.host}"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index) if self.gpu else torch.device("cpu")


def choose_place(kind: str, local_rank: int, share_gpus: bool) -> Place:
    """The place of this rank, whose GPU becomes the current one. kind: `auto`, `cpu` or `cuda`. share_gpus: allow more
    ranks than GPUs."""
    host, gpus = platform.node(), torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not gpus):
        return Place(host)
    if not gpus:
        return Place(host, error=f"train.device = cuda, but torch finds no GPU on {host}; use train.device=cpu")
    # torchrun's number of local ranks, not only this rank's own, so that it is the same on each
    started = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # A single one may be this rank's own, and its peers see others: srun --gpus-per-task=1, or a slice of a GPU.
    if 1 < gpus < started and not share_gpus:
        error = (
            f"{started} ranks were started on {host}, where torch finds {gpus} GPUs; start at most {gpus} there "
            f"(torchrun --nproc_per_node={gpus}), or use train.backend=gloo, with which ranks can share a GPU"
        )
        return Place(host, error=error)
    index = local_rank % gpus
    try:
        torch.cuda.set_device(index)
        found: Any = torch.cuda.get_device_properties(index)
    except RuntimeError as error:
        why = f"train.device = {kind}: torch cannot use a GPU of {host} ({first_line(error)})"
        return Place(host, error=f"{why}; repair its driver, or use train.device=cpu")
    address = ":".join(f"{number:x}" for number in (found.pci_domain_id, found.pci_bus_id, found.pci_device_id))
    return Place(host, index, found.name, f"{found.uuid} at {address}")


def check_places(places: Sequence[Place], share_gpus: bool) -> None:
    """Check the places of all ranks, by rank. Raises UserError, the same on each, where one has no device, where some
    have GPUs and others have none, and, unless `share_gpus`, where two have the same GPU."""
    for place in places:
        if place.error:
            raise UserError(place.error)
    with_gpu, without = ([rank for rank, place in enumerate(places) if bool(place.gpu) is has] for has in (True, False))
    if with_gpu and without:
        some, other = with_gpu[0], without[0]
        raise UserError(
            f"rank {some} has a GPU ({places[some]}) and rank {other} has none ({places[other]}); use hosts that all "
            f"have GPUs, or train.device=cpu"
        )
    first: dict[tuple[str, str], int] = {}
    for rank in with_gpu if not share_gpus else ():
        place = places[rank]
        other = first.setdefault((place.host, place.identity), rank)
        if other != rank:
            raise UserError(
                f"ranks {other} and {rank} have the same GPU ({place}, {place.identity}); start one rank for each GPU "
                f"(torchrun --nproc_per_node=1, or srun --gpus-per-task=1 and as many GPUs as tasks), or use "
                f"train.backend=gloo, with which ranks can share one"
            )


def of_device(error: BaseException) -> bool:
    """Whether an error is that of a GPU, or of a library that computes on it, other than for lack of memory."""
    named = isinstance(error, RuntimeError) and re.match("(CUDA|HIP|cuDNN)( driver| Frontend)? error", str(error))
    return (isinstance(error, torch.AcceleratorError) or bool(named)) and not needs_memory(error)


def keep_memory() -> None:
    """Have glibc keep freed memory; otherwise the pages of large activations are faulted in again at every layer."""
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 512 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc("mallopt", parameter, value)


def set_arithmetic(deterministic: bool) -> None:
    """Set torch's arithmetic for the process: TF32 off, and, if asked for, deterministic kernels only."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Only warn of a kernel without a deterministic form: max_pool2d's backward is listed as one on CUDA, but the
    # pooling windows of a block do not overlap, so that each input's gradient has at most one addend.
    # torch.use_deterministic_algorithms would do the same, but takes two seconds to import the compiler.
    torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    # The deterministic mode would also fill every new tensor with NaN, 3 % of a step on a CPU, so that reads of
    # uninitialised memory repeat. No result depends on such reads: tests/training/test_train.py tries both.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", "max_pool2d_with_indices_backward_cuda does not have a deterministic")
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # torch 2.9 calls these two names deprecated, but raises where only their replacements are set
    warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # sums of long matrix products in float32, as on a CPU, and not partly in the precision of the factors
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def written_once() -> Iterator[None]:
    """A context for writes to indices of which none occurs twice: they are exact without the sorting of deterministic
    kernels, which launches thirteen on a GPU."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


_LONG_ENOUGH = 0.01  # seconds of one matrix product; larger ones have about the same rate


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of `dtype` on this rank: the fastest of ten products.

    On a CPU the time is that of the processor, which other work on the machine hardly changes."""
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        a = torch.randn(size, size, device=device, dtype=dtype)
        product = torch.empty_like(a)
        _product_seconds(a, product)  # allocates, and chooses a kernel
        seconds = min(_product_seconds(a, product) for _ in range(2))
        if seconds > _LONG_ENOUGH:  # the largest take seconds on a CPU without instructions for the dtype
            break
    return 2 * size**3 / min(seconds, *(_product_seconds(a, product) for _ in range(8)))


def _product_seconds(a: torch.Tensor, product: torch.Tensor) -> float:
    on_cpu = a.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    start = clock()
    torch.mm(a, a, out=product)
    product[0, 0].item()  # waits for the device
    cores = min(torch.get_num_threads(), len(os.sched_getaffinity(0))) if on_cpu else 1
    return (clock() - start) / cores


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
