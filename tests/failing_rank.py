"""The trainer with an artificial error on rank 1 in step 4, to be started by torchrun."""

import os
from typing import Any

from torch import Tensor

from dist_train.main import entry
from dist_train.training.optimizers import Optimizers

steps = 0
step = Optimizers.step


def fail_later(self: Optimizers, scaler: Any) -> Tensor:
    global steps
    steps += 1
    if steps == 4 and os.environ["RANK"] == "1":
        raise ValueError("out of luck on purpose")
    return step(self, scaler)


if __name__ == "__main__":
    Optimizers.step = fail_later  # type: ignore[method-assign]
    entry()
