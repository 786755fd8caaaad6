"""This process's rank from the launcher's environment variables, and the number of ranks to launch. Without torch,
whose import takes seconds."""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from pathlib import Path

from dist_train.errors import LauncherError, UserError

# device files of the GPU drivers that torch supports: NVIDIA's, AMD's, and Windows' (WSL)
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = f"start with torchrun, which sets it, or unset {', '.join(_VARIABLES)}"


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment variables; (0, 1, 0) without a launcher.

    Raises LauncherError when only part of these variables is set, or one has a value that no launcher gives."""
    given = [name for name in _VARIABLES if name in os.environ]
    if not given:
        return 0, 1, 0
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise LauncherError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start with torchrun, "
            f"or unset all of them"
        )
    world_size = variable("WORLD_SIZE", 1)
    rank, local_rank = variable("RANK", 0, world_size - 1), variable("LOCAL_RANK", 0, world_size - 1)
    if "LOCAL_WORLD_SIZE" in os.environ:
        variable("LOCAL_WORLD_SIZE", local_rank + 1, world_size)
    variable("MASTER_PORT", 1, 2**16 - 1)
    if not re.fullmatch(r"[!-~]+", address := os.environ["MASTER_ADDR"]):
        raise LauncherError(f"MASTER_ADDR = {address!r:.40}: give the name or the address of rank 0's host; {_REMEDY}")
    return rank, world_size, local_rank


def variable(name: str, low: int, high: int = 2**31 - 1, remedy: str = _REMEDY) -> int:
    """An environment variable that a launcher sets to a number from `low` to `high`. Raises LauncherError, with the
    remedy, for any other value, and where it is missing."""
    text = os.environ.get(name, "")
    if not re.fullmatch("[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise LauncherError(f"{name} = {text!r:.40}: give a whole number from {low} to {high}; {remedy}")
    return int(text)


def meet_on_this_machine() -> None:
    """Have a rank reach what is on its own machine through the local address, since the machine's own name may not
    resolve, and torch then tries for minutes. Where all ranks are here, so do gloo and NCCL, unless
    GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME is set. Call it after `launched_as`."""
    if os.environ["MASTER_ADDR"] in (platform.node(), "localhost"):
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def wait_for_store(rank: int, seconds: float) -> None:
    """Wait until the rendezvous store can be connected to; where this rank is to hold it, there is nothing to wait for.
    Torch's own client, whose store is not there in time, prints a stack trace and tries for a second time as long.
    Raises RuntimeError after `seconds`."""
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = os.environ["MASTER_ADDR"], variable("MASTER_PORT", 1, 2**16 - 1)
    end, pause = time.monotonic() + seconds, 0.01
    while True:
        try:
            socket.create_connection(address, max(1.0, min(10.0, end - time.monotonic()))).close()
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(f"none answers within {seconds:g} s ({error.strerror or error})") from None
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        else:
            return


def without_launcher() -> dict[str, str]:
    """This process's environment without the variables of a launcher, for a trainer that is started without one."""
    return {name: value for name, value in os.environ.items() if name not in _VARIABLES}


def first_of_node() -> bool:
    """Whether this rank is the first on its node; a process without a launcher is."""
    return "0" in (os.environ.get("LOCAL_RANK", "0"), os.environ.get("RANK", "0"))


def check_world_size(microbatches: int) -> None:
    """Raises UserError for more ranks than there are microbatches."""
    world_size = launched_as()[1]
    if world_size > microbatches:
        raise UserError(
            f"train.microbatches = {microbatches} gives work to at most {microbatches} ranks, but {world_size} were "
            f"started; start fewer, or raise train.microbatches"
        )


def has_driver() -> bool:
    """Whether this machine has the driver of a GPU."""
    return any(Path(driver).exists() for driver in _DRIVER_FILES)


def gpus_here() -> int:
    """The number of GPUs that torch finds on this machine. Imports torch only where there is a driver."""
    if not has_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def ranks_per_node(microbatches: int, workers: int, nodes: int = 1) -> int:
    """The fewest ranks on each of `nodes` nodes that are as fast as `workers` on each, and not more in all than there
    are microbatches: a step takes as long as the largest share of the microbatches."""
    share = -(-microbatches // (nodes * min(workers, microbatches // nodes)))
    return -(-microbatches // (nodes * share))
