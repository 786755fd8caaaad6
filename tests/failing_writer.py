"""The trainer with an artificial fault of what rank 0 writes, named by $FAULT:

- slow: every checkpoint takes a second, and the loss of step 4 is not finite;
- unwritable: no checkpoint but the first can be written, with an error of torch, and a stop signal comes in step 4;
- details: the last evaluation's details need more memory than there is.
"""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dist_train.main import entry
from dist_train.runs import checkpoint
from dist_train.training.evaluation import Evaluation
from dist_train.training.optimizers import Optimizers
from dist_train.training.step_log import StepLog

FAULT = os.environ["FAULT"]
save, step, check = checkpoint.save, Optimizers.step, StepLog._check
steps = 0


def save_slowly(*arguments: Any) -> Path:
    time.sleep(1)
    return save(*arguments)


def save_once(folder: Path, number: int, *arguments: Any) -> Path:
    if number > 1:
        raise RuntimeError("unexpected pos 64 vs 0\nand a second line")
    return save(folder, number, *arguments)


def check_badly(self: Any, number: int, parts: list[list[float]], saved: int) -> None:
    if number == 4:
        parts[0][0] = math.nan
    check(self, number, parts, saved)


def step_and_stop(self: Optimizers, scaler: Any) -> Tensor:
    global steps
    steps += 1
    if steps == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, scaler)


def too_large(*_: Any) -> dict[str, Any]:
    raise MemoryError


if __name__ == "__main__":
    if FAULT == "slow":
        patch.object(checkpoint, "save", save_slowly).start()
        patch.object(StepLog, "_check", check_badly).start()
    elif FAULT == "unwritable":
        patch.object(checkpoint, "save", save_once).start()
        patch.object(Optimizers, "step", step_and_stop).start()
    else:
        patch.object(Evaluation, "details", too_large).start()
    entry()
