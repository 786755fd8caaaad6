"""The device of a rank, its arithmetic and its speed."""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dist_train.errors import UserError
from dist_train.signals import libc


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a forward pass. precision: `bf16`, `fp16` or `fp32`, which disables it."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


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


def choose_device(kind: str, local_rank: int, share_gpus: bool) -> torch.device:
    """The device of a rank. kind: `auto`, `cpu` or `cuda`. share_gpus: allow more ranks than GPUs on this machine.
    Raises UserError when there is no such device."""
    gpus = torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise UserError("train.device = cuda, but torch finds no GPU on this machine; use train.device=cpu")
    # torchrun's number of local ranks, not only this rank's own, so that every rank raises the same error
    started = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if started > gpus and not share_gpus:
        raise UserError(
            f"torchrun started {started} ranks on this machine, which has {gpus} GPUs; lower --nproc_per_node, or use "
            f"train.device=cpu"
        )
    return torch.device("cuda", local_rank % gpus)


def of_device(error: BaseException) -> bool:
    """Whether an error is that of a GPU, or of a library that computes on it."""
    named = isinstance(error, RuntimeError) and re.match("(CUDA|HIP|cuDNN)( driver| Frontend)? error", str(error))
    return isinstance(error, torch.AcceleratorError) or bool(named)


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


_LONG_ENOUGH = 0.01  # seconds of one matrix product; larger ones have about the same rate


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices of `dtype` on this rank, the median of five products."""
    times = []
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        a = torch.randn(size, size, device=device, dtype=dtype)
        times = [_product_seconds(a) for _ in range(2)]
        if times[-1] > _LONG_ENOUGH:  # the largest take seconds on a CPU without instructions for the dtype
            break
    times += [_product_seconds(a) for _ in range(4)]
    return 2 * size**3 / statistics.median(times[1:])


def _product_seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return time.perf_counter() - start


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
