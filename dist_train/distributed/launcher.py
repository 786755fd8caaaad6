"""This process's rank from the launcher's environment variables, and the number of ranks to launch. Without torch,
whose import takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.errors import UserError

# device files of the GPU drivers that torch supports: NVIDIA's, AMD's, and Windows' (WSL)
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's environment variables; (0, 1, 0) without a launcher.

    Raises UserError when only part of these variables is set, or one is not a number."""
    given = [name for name in _VARIABLES if name in os.environ]
    if not given:
        return 0, 1, 0
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise UserError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start with torchrun, "
            f"or unset all of them"
        )
    try:
        rank, world_size, local_rank = (int(os.environ[name]) for name in _VARIABLES[:3])
    except ValueError:
        raise UserError("RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers; start with torchrun") from None
    return rank, world_size, local_rank


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


def gpus_here() -> int:
    """The number of GPUs that torch finds on this machine. Imports torch only where there is a driver."""
    if not any(Path(driver).exists() for driver in _DRIVER_FILES):
        return 0
    import torch

    return torch.cuda.device_count()


def ranks_per_node(microbatches: int, workers: int, nodes: int = 1) -> int:
    """The fewest ranks on each of `nodes` nodes that are as fast as `workers` on each, and not more in all than there
    are microbatches: a step takes as long as the largest share of the microbatches."""
    share = -(-microbatches // (nodes * min(workers, microbatches // nodes)))
    return -(-microbatches // (nodes * share))
