"""The kind of each step, and what is due after it (exchange, digest, evaluation, checkpoint): functions of the
configuration and the step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dist_train.config.settings import Config
from dist_train.data.batches import Data
from dist_train.training.optimizers import Optimizers
from dist_train.training.selection import Selection


@dataclass(frozen=True)
class Due:
    """What is due after a step. exchange: of losses and stop requests between the ranks. digest: of the weights, in
    the metrics."""

    exchange: bool
    digest: bool
    evaluation: bool
    checkpoint: bool


class Schedule:
    """Decides what is due after which step."""

    def __init__(self, config: Config, data: Data, log_every: int) -> None:
        """log_every: the most steps between two exchanges."""
        self.config, self.log_every = config, log_every
        self.steps_per_epoch, self.total_steps = data.steps_per_epoch, data.total_steps

    def after(self, step: int) -> Due:
        """What is due when `step` steps are finished."""
        last, epoch_ends = step == self.total_steps, step % self.steps_per_epoch == 0
        checkpoint = last or self._saves(step)
        digest = last or epoch_ends or _every(self.config.record.digest_every, step)
        evaluates = epoch_ends and step // self.steps_per_epoch % self.config.evaluate.every == 0
        return Due(
            exchange=checkpoint or digest or _every(self.log_every, step),
            digest=digest,
            evaluation=last or evaluates,
            checkpoint=checkpoint,
        )

    def epoch(self, step: int) -> float:
        """Epochs finished after `step` steps: an int at an epoch's end, else a fraction."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return step / self.steps_per_epoch if within else epoch

    def _saves(self, step: int) -> bool:
        settings = self.config.checkpoint
        return _every(settings.every_steps, step) or _every(settings.every_epochs * self.steps_per_epoch, step)


def _every(interval: int, step: int) -> bool:
    """Whether something is due after `step` that happens every `interval` steps; 0 is never."""
    return interval > 0 and step % interval == 0


@dataclass(frozen=True)
class Kind:
    """What the operations of a step depend on. height, width: of the images in pixels. kept, size: the images of a
    microbatch that are trained on, and all of them."""

    height: int
    width: int
    stem_learns: bool
    kept: int
    size: int

    @property
    def label(self) -> str:
        """The kind in words."""
        stem = "learns" if self.stem_learns else "fixed"
        return f"{self.height}x{self.width}, stem {stem}" + f", {self.kept} of {self.size}" * (self.kept < self.size)


def kind_of(step: int, data: Data, optimizers: Optimizers, selection: Selection) -> Kind:
    """The kind of the step after `step` finished ones."""
    return Kind(*data.image_size(step), optimizers.learns("stem", step), selection.kept(step), data.size)


def kinds(data: Data, optimizers: Optimizers, selection: Selection, start: int = 0) -> list[tuple[Kind, range]]:
    """The kinds of the steps from `start` to the last, counted from 0, in order, and which steps those are."""
    result: list[tuple[Kind, range]] = []
    for kind, steps in itertools.groupby(
        range(start, data.total_steps), lambda step: kind_of(step, data, optimizers, selection)
    ):
        first, *rest = steps
        result.append((kind, range(first, first + 1 + len(rest))))
    return result
