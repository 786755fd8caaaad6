"""A first run of everything that a step does, before training and its clock start.

The first step of its kind takes longer than the next: libraries load and choose their kernels, the compiler compiles,
and the ranks connect to each other.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from dataclasses import dataclass

import torch

from dist_train.config.settings import Config
from dist_train.data.batches import Data, Microbatch
from dist_train.distributed.ranks import Ranks
from dist_train.training.loop import State, TrainStep
from dist_train.training.optimizers import Optimizers
from dist_train.training.selection import Selection


@dataclass(frozen=True)
class Kind:
    """Steps that run the same operations. height, width: of the images in pixels. first: the first of them, counted
    from 0. count: their number. label: the kind in words."""

    height: int
    width: int
    label: str
    first: int
    count: int


def kinds(data: Data, optimizers: Optimizers, selection: Selection, start: int = 0) -> list[Kind]:
    """The kinds of the steps from `start` to the last, in order."""

    def kind(step: int) -> tuple[int, int, str]:
        height, width = data.image_size(step)
        chosen = f", {selection.kept(step)} of {data.size}" if selection.kept(step) < data.size else ""
        return (
            height,
            width,
            f"{height}x{width}, stem {'learns' if optimizers.learns('stem', step) else 'fixed'}{chosen}",
        )

    runs = [(key, list(steps)) for key, steps in itertools.groupby(range(start, data.total_steps), kind)]
    return [Kind(*key, steps[0], len(steps)) for key, steps in runs]


def warm_up(config: Config, data: Data, ranks: Ranks, state: State) -> float:
    """Run one step of each kind that is left, of one microbatch a rank, on a copy of the state. Returns the seconds
    that it took. Changes nothing: the state that is trained is the same bits with and without it."""
    begin = time.perf_counter()
    throwaway = State.start(config, copy.deepcopy(state.model), data.total_steps, data.images)
    settings = dataclasses.replace(config.train, batch_size=ranks.world_size * data.size, microbatches=ranks.world_size)
    step = TrainStep(settings, data, ranks, throwaway)
    generator = torch.Generator().manual_seed(0)
    for kind in kinds(data, state.optimizers, step.selection, state.step):
        # the last step of its kind: at the first of all, learning rates may be 0, and updates are skipped
        throwaway.step = kind.first + kind.count - 1
        shape = (data.size, state.model.channels, kind.height, kind.width)
        images = torch.randn(shape, generator=generator).to(ranks.device, memory_format=torch.channels_last)
        labels = torch.zeros(data.size, dtype=torch.int64, device=ranks.device)
        metrics = step([Microbatch(ranks.rank, images, labels, labels)])
        metrics.norm.item()  # waits for the device
    return time.perf_counter() - begin
