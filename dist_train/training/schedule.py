"""What is due after which step: a pure function of the configuration and the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_train.config.settings import Config


@dataclass(frozen=True)
class Due:
    """What follows a step. exchange: of losses and stop requests between the ranks. digest: of the weights, into the
    metrics. evaluation; checkpoint."""

    exchange: bool
    digest: bool
    evaluation: bool
    checkpoint: bool


class Schedule:
    """steps_per_epoch, last_step: steps counted from 1."""

    def __init__(self, config: Config, steps_per_epoch: int, log_every: int) -> None:
        """log_every: steps between two exchanges at most."""
        self.config, self.steps_per_epoch, self.log_every = config, steps_per_epoch, log_every
        self.last_step = total_steps(config, steps_per_epoch)

    def after(self, step: int) -> Due:
        """What is due when `step` steps are finished."""
        last, epoch_ends = step == self.last_step, step % self.steps_per_epoch == 0
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
        """Epochs finished after `step` steps: a whole number at an epoch's end, else a fraction."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return step / self.steps_per_epoch if within else epoch

    def _saves(self, step: int) -> bool:
        saving = self.config.checkpoint
        return _every(saving.every_steps, step) or _every(saving.every_epochs * self.steps_per_epoch, step)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Steps of the whole run; the last epoch's fraction is rounded up to whole ones."""
    return math.ceil(config.train.epochs * steps_per_epoch)


def _every(interval: int, step: int) -> bool:
    """Whether `interval`, 0 for never, divides the step."""
    return interval > 0 and step % interval == 0
