"""The device of a rank, its arithmetic and its speed."""

from __future__ import annotations

import os
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
    """The context of a forward pass. precision: of TrainConfig."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


@contextmanager
def muted_stdout() -> Iterator[None]:
    """Drop what is written to stdout, by C++ too: the gloo of torch 2.9 says there how many peers it has found, which
    no setting of it prevents."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        sys.stdout.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def choose_device(kind: str, local_rank: int, share_gpus: bool) -> torch.device:
    gpus = torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise UserError("train.device = cuda, but torch sees no GPU here; use train.device=cpu")
    # by what torchrun says of all of them, so that all find it
    started = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if started > gpus and not share_gpus:
        raise UserError(
            f"torchrun started {started} ranks on this machine, which has {gpus} GPUs; lower --nproc_per_node, or use "
            f"train.device=cpu"
        )
    return torch.device("cuda", local_rank % gpus)


def keep_memory() -> None:
    """Have glibc keep freed memory: pages of large activations are else faulted in anew at every layer."""
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 512 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc("mallopt", parameter, value)


def set_arithmetic(deterministic: bool) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Only warn of a kernel that has no deterministic form: max_pool2d's backward is listed as one on CUDA, but
    # windows that do not overlap, as here, give each input at most one addend.
    # torch.use_deterministic_algorithms does the same, and imports the compiler for two seconds.
    torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    # The deterministic mode would also fill every new tensor with NaN, 3 % of a step on a CPU, so that reads of what
    # nobody wrote repeat. There are none, and no result depends on it: tests/training/test_train.py tries both.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", "max_pool2d_with_indices_backward_cuda does not have a deterministic")
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # torch 2.9 warns of these names, but reads them itself, and raises where only those that it names were set
    warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


_LONG_ENOUGH = 0.01  # seconds of one matrix product, for its rate to be that of a larger one


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of two square matrices on this rank, the median of five."""
    times = []
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        a = torch.randn(size, size, device=device, dtype=dtype)
        times = [_product_seconds(a) for _ in range(2)]
        if times[-1] > _LONG_ENOUGH:  # a CPU without instructions for the dtype takes seconds for the largest
            break
    times += [_product_seconds(a) for _ in range(4)]
    return 2 * size**3 / statistics.median(times[1:])


def _product_seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return time.perf_counter() - start


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
