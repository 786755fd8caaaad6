"""A first run of everything that a step does, before training and its clock start.

The first step of its kind takes longer than the next: libraries load and choose their kernels, the compiler compiles,
and the ranks connect to each other.
"""

from __future__ import annotations

import copy
import dataclasses
import time

import torch

from dist_train.config.settings import Config
from dist_train.data.batches import Data, Microbatch
from dist_train.distributed.ranks import Ranks
from dist_train.training.loop import State, TrainStep
from dist_train.training.schedule import kinds


def warm_up(config: Config, data: Data, ranks: Ranks, state: State) -> float:
    """Run one step of each kind that is left, of one microbatch a rank, on a copy of the state. Returns the seconds
    that it took. Changes nothing: the state that is trained is the same bits with and without it."""
    begin = time.perf_counter()
    throwaway = State.start(config, copy.deepcopy(state.model), data.total_steps, data.images)
    recorded = ranks.on_gpu and config.train.cuda_graphs  # in the state that is trained, with a first run and compiled
    settings = dataclasses.replace(
        config.train,
        batch_size=ranks.world_size * data.size,
        microbatches=ranks.world_size,
        cuda_graphs=False,
        compile=config.train.compile and not recorded,
    )
    step = TrainStep(settings, data, ranks, throwaway)
    generator = torch.Generator().manual_seed(0)
    for kind, steps in kinds(data, state.optimizers, step.selection, state.step):
        throwaway.step = steps[-1]  # at the first of all, learning rates may be 0, and updates are skipped
        shape = (data.size, state.model.channels, kind.height, kind.width)
        images = torch.randn(shape, generator=generator).to(ranks.device, memory_format=torch.channels_last)
        labels = torch.zeros(data.size, dtype=torch.int64, device=ranks.device)
        metrics = step([Microbatch(ranks.rank, images, labels, labels)])
        metrics.norm.item()  # waits for the device
    return time.perf_counter() - begin
