"""What is due after each step (exchange, digest, evaluation, checkpoint): a function of configuration and step."""

from __future__ import annotations

from dataclasses import dataclass

from dist_train.config.settings import Config
from dist_train.data.batches import Data


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
