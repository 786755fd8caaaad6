"""The trainer's entry on every rank: torchrun ... -m dist_train.main, dist-train train.

It checks all that needs no torch and prepares the betons before it imports torch, which takes seconds.
"""

from __future__ import annotations

from dist_train.signals import StopNow, Stopped, ended_within, hold_back, stop_with_launcher

if __name__ == "__main__":
    # The launcher stops all ranks as soon as one fails. With bad input every rank fails, and the launcher's signal must
    # not end the rank that prints the message before it has done so.
    hold_back()

import argparse
import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import psutil

from dist_train import config, data_prep
from dist_train.command_line import survive_output, use_utf8
from dist_train.config.arguments import default_run_dir, parser, resolve
from dist_train.config.effects import check_effects
from dist_train.data import dataset
from dist_train.distributed.launcher import check_world_size, first_of_node, has_driver, launched_as
from dist_train.errors import (
    BAD_INPUT,
    FAILED,
    PREEMPTED,
    DeviceError,
    DivergedError,
    LauncherError,
    LostPeerError,
    LostRecordError,
    Outcome,
    UserError,
    needs_memory,
    say,
    shortage,
    unusable,
)
from dist_train.model.shapes import check_training, image_shapes
from dist_train.runs.layout import is_run
from dist_train.tracking.variables import resolved

_SILENT_WAIT = 2.0  # seconds of waiting for the betons after which the wait is reported
_REPORTING = 10.0  # seconds that a rank waits for the rank that prints an error of all ranks


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped by a signal after saving."""
    outcome = Outcome()
    with ExitStack() as held:
        try:
            start = time.perf_counter()
            launched_as()
            settings, run_dir = _checked(parser().parse_intermixed_args(arguments))
            with StopNow():
                waited, manifest = _prepared(settings)
            outcome.detected_by = "all"
            from dist_train.training.train import Job, run  # not at the top: it imports torch

            run(Job(settings, run_dir, manifest, waited, start), held, outcome)
        except LauncherError as error:
            outcome.code = BAD_INPUT
            say(str(error))
        except UserError as error:
            outcome.code, outcome.reason = BAD_INPUT, str(error)
            _print_once(outcome)
        except Stopped as stopped:
            outcome.code = PREEMPTED
            if first_of_node():
                say(f"stopped by {stopped.name} before the training began; the same command starts it")
        except DivergedError as error:  # raised on every rank
            outcome.reason = str(error)
            if os.environ.get("RANK", "0") == "0":
                say(outcome.reason)
        except (DeviceError, LostRecordError) as error:
            outcome.reason = str(error)
            say(outcome.reason)
        except LostPeerError as error:
            outcome.reason = str(error)
            if error.reported_here:
                say(outcome.reason)
        except OSError as error:
            outcome.reason = f"{type(error).__name__}: {error}"
            if error.filename is None:
                raise
            outcome.reason = unusable(error)
            if outcome.detected_by == "node":
                outcome.code = BAD_INPUT
                _print_once(outcome)
            else:
                say(outcome.reason)
        except BaseException as error:
            outcome.reason = f"{type(error).__name__}: {error}"
            if not needs_memory(error):
                raise
            outcome.reason = (
                f"rank {os.environ.get('RANK', '0')} ran out of memory ({shortage(error)}); raise "
                f"train.microbatches, lower train.batch_size or data.eval_batch, make the network smaller, or end what "
                f"else uses that memory"
            )
            say(outcome.reason)
    return outcome.code


def _checked(args: argparse.Namespace) -> tuple[config.Config, Path]:
    """The configuration and the run folder, after every check that needs only these. Raises UserError."""
    name, settings = resolve(args)
    check_world_size(settings.train.microbatches)
    run_dir = args.run_dir or default_run_dir(name, settings)
    check_run(settings, run_dir, config.given(args.config, args.settings))
    dataset.check(settings.data)
    return settings, run_dir


def check_run(settings: config.Config, run_dir: Path, given: list[str]) -> None:
    """Raises UserError for settings that a run in this folder cannot have. given: those that were given, see
    `config.given`."""
    try:
        config.check_folder(run_dir, settings)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another folder") from None
    if not is_run(run_dir):
        check_effects(settings, given)
    resolved(settings.record)  # raises UserError for what W&B does not accept


def _prepared(settings: config.Config) -> tuple[bool, data_prep.Manifest | None]:
    """Check or write the betons on the first rank of each node, while the node's other ranks wait. This is done before
    the ranks join the process group, since waiting there has a timeout. Returns whether the betons had to be written,
    and their manifest, None on the ranks that waited. Raises UserError and LostPeerError."""
    stop_with_launcher()
    data, waited = settings.data, not dataset.is_written(settings.data)
    if first_of_node():
        manifest = dataset.prepare(data)
        dataset.check_images(data, manifest, settings.train.batch_size)
        memory = psutil.virtual_memory().total
        # that of a GPU is known only to torch
        activations = math.inf if settings.train.device != "cpu" and has_driver() else memory
        images, classes = manifest.splits["test"].count, len(manifest.classes)
        for shape in image_shapes(settings, manifest.image_shape):
            check_training(settings, shape, classes, images, memory, activations)
        return waited, manifest
    start, reported = time.monotonic(), os.environ["LOCAL_RANK"] != "1"
    while not dataset.is_written(data):
        if not reported and time.monotonic() > start + _SILENT_WAIT:
            say(f"{data.folder} is not there yet: the other ranks of this node wait for the first, which prepares it")
            reported = True
        time.sleep(0.1)
    return waited, None


def _print_once(outcome: Outcome) -> None:
    """Print the reason of a failure that several ranks detect, on one of them."""
    reports = first_of_node() if outcome.detected_by == "node" else os.environ.get("RANK", "0") == "0"
    # The rank that reports exits at once, and the launcher then ends the other ranks; they wait for that, because the
    # launcher would end the rank that reports if another exited first.
    if reports:
        say(outcome.reason)
    else:
        ended_within(_REPORTING)


def entry(arguments: list[str] | None = None) -> NoReturn:
    """Run the command, and end the process with its exit code."""
    if arguments is None:
        use_utf8()
    survive_output()
    # Ctrl-C ends the process without a traceback, until there is a training state to save.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A launcher's store ends with it: without this, torch shows its C++ stack for each connection to it that breaks,
    # although the ranks save and stop.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = main(arguments)
    except Exception as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # for torchrun's error report
        sys.excepthook(*sys.exc_info())
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are written, and the process group is destroyed. The interpreter's shutdown would race with native
    # threads of gloo and ffcv, and sometimes abort a finished rank ("terminate called"). After an error it could wait
    # for operations between GPUs that never end.
    os._exit(code)


if __name__ == "__main__":
    entry()
