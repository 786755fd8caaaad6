"""Who this process is among the ranks, as the launcher says, and how many ranks to launch. Without torch, whose import
takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.errors import UserError

# what the drivers of GPUs that torch knows put into /dev: NVIDIA's, AMD's, and those of Windows
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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


def first_of_node() -> bool:
    """Whether this rank is the first on its machine, also when it is alone."""
    return "0" in (os.environ.get("LOCAL_RANK", "0"), os.environ.get("RANK", "0"))


def check_world_size(microbatches: int) -> None:
    """Raises UserError for more ranks than there are microbatches."""
    world_size = launched_as()[1]
    if world_size > microbatches:
        raise UserError(
            f"train.microbatches = {microbatches} gives work to {microbatches} ranks at most, but {world_size} were "
            f"started; start fewer, or raise train.microbatches"
        )


def gpus_here() -> int:
    """How many GPUs torch sees on this machine. torch is imported only where there is a driver."""
    if not any(Path(driver).exists() for driver in _DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def ranks_per_node(microbatches: int, workers: int, nodes: int = 1) -> int:
    """The fewest ranks on each of `nodes` nodes, no more than there are microbatches, that are as fast as `workers` on
    each: a step takes as long as the largest share."""
    share = -(-microbatches // (nodes * min(workers, microbatches // nodes)))
    return -(-microbatches // (nodes * share))
