"""The trainer's entry on every rank: torchrun ... -m dist_train.main, dist-train train.

It checks all that needs no torch, has the betons prepared, and only then imports torch, which takes seconds.
"""

from __future__ import annotations

from dist_train.signals import StopNow, Stopped, ended_within, hold_back, stop_with_launcher

if __name__ == "__main__":
    # The launcher stops all ranks as soon as one fails. With bad input all of them fail, and this one may have to
    # print the sentence first.
    hold_back()

import argparse
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from dist_train import config, data_prep
from dist_train.config.arguments import default_run_dir, parser, resolve
from dist_train.config.settings import check_batch
from dist_train.data import dataset
from dist_train.distributed.launcher import check_world_size, first_of_node
from dist_train.errors import BAD_INPUT, PREEMPTED, DivergedError, LostPeerError, Outcome, UserError, say
from dist_train.model.shapes import shapes

_PATIENCE = 2.0  # seconds of waiting for the betons before it is reported
_REPORTING = 10.0  # seconds for the rank that reports for the others to do so


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 failed, 2 bad input, 75 asked to stop, with all saved."""
    outcome = Outcome()
    with ExitStack() as held:
        try:
            start = time.perf_counter()
            settings, run_dir = _checked(parser().parse_intermixed_args(arguments))
            with StopNow():
                waited, manifest = _prepared(settings)
            outcome.detected_by = "one"
            from dist_train.training.train import Job, run  # imports torch, for seconds

            run(Job(settings, run_dir, manifest, waited, start), held, outcome)
        except UserError as error:
            outcome.code, outcome.reason = BAD_INPUT, str(error)
            _print_once(outcome)
        except Stopped as stopped:
            outcome.code = PREEMPTED
            if first_of_node():
                say(f"stopped by {stopped.name} before the training began; the same command starts it")
        except DivergedError as error:  # all ranks have it
            outcome.reason = str(error)
            if os.environ.get("RANK", "0") == "0":
                say(outcome.reason)
        except LostPeerError as error:
            outcome.reason = str(error)
            if error.reported_here:
                say(outcome.reason)
        except BaseException as error:
            outcome.reason = f"{type(error).__name__}: {error}"
            raise
    return outcome.code


def _checked(args: argparse.Namespace) -> tuple[config.Config, Path]:
    """The configuration and the run folder, after every check that takes no more than these. Raises UserError."""
    name, settings = resolve(args)
    check_world_size(settings.train.microbatches)
    check_batch(settings.train.batch_size, settings.train.microbatches)
    run_dir = args.run_dir or default_run_dir(name, settings)
    try:
        config.check_folder(run_dir, settings)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another folder") from None
    dataset.check(settings.data)
    return settings, run_dir


def _prepared(settings: config.Config) -> tuple[bool, data_prep.Manifest | None]:
    """Have the first rank of each node check or write the betons, while the node's others wait: before the process
    group is joined, since waiting there has a timeout. Returns whether the betons had to be written, and on the first
    rank their manifest. Raises UserError and LostPeerError."""
    stop_with_launcher()
    data, waited = settings.data, not dataset.is_written(settings.data)
    if first_of_node():
        manifest = dataset.prepare(data)
        dataset.check_images(data, manifest, settings.train.batch_size)
        height, width, channels = manifest.image_shape
        for size in ((height, width), *((smaller.size, smaller.size) for smaller in data.smaller)):
            shapes(settings.model, (channels, *size))
        return waited, manifest
    start, reported = time.monotonic(), os.environ["LOCAL_RANK"] != "1"
    while not dataset.is_written(data):
        if not reported and time.monotonic() > start + _PATIENCE:
            say(f"{data.folder} is not there yet: the other ranks of this node wait for the first, which prepares it")
            reported = True
        time.sleep(0.1)
    return waited, None


def _print_once(outcome: Outcome) -> None:
    """Print what was wrong, unless another rank does."""
    reports = first_of_node() if outcome.detected_by == "node" else os.environ.get("RANK", "0") == "0"
    # The rank that reports exits at once, and the launcher then ends the others. If one of those exited first, the
    # launcher would end the rank that reports.
    if reports or (not ended_within(_REPORTING) and outcome.detected_by == "one"):
        say(outcome.reason)


def entry(arguments: list[str] | None = None) -> NoReturn:
    """Run the command, and end the process with its exit code."""
    # Ctrl-C ends the process without a traceback, until the training is there to be saved.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        code = main(arguments)
    except Exception as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # torchrun shows it
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    # All is on the disk, and the process group is left. The interpreter's own end would race with native threads
    # of gloo and ffcv, which now and then aborts a rank that has finished ("terminate called").
    os._exit(code)


if __name__ == "__main__":
    entry()
