"""Train a block network.

    torchrun --nproc_per_node=4 -m dist_train.main --preset block94
    python -m dist_train.main --preset digits train.epochs=4 seed=1

The same run folder means resume; without --run-dir it is named by the configuration, so that the same command
goes on where it stopped. Settings are key=value with the names of config.toml; a key's last part alone will
do where it is unambiguous.
"""

from __future__ import annotations

from dist_train.stopping import hold_back

if __name__ == "__main__":
    # The launcher stops a rank as soon as another fails. By bad input all do, and this one may have to say so.
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
from dist_train.errors import (
    BAD_INPUT,
    PREEMPTED,
    DivergedError,
    LostPeerError,
    Outcome,
    UserError,
    say,
)
from dist_train.launched import check_world_size, first_of_node, stop_with_launcher
from dist_train.settings import check_batch, check_images, shapes
from dist_train.stopping import StopNow, Stopped, ended_within

_PATIENCE = 2.0  # seconds until waiting for the betons is worth a word
_SPEAKING = 10.0  # seconds for the rank that speaks for the others to do so


def parser() -> argparse.ArgumentParser:
    described = _Parser(
        prog="python -m dist_train.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"settings and their defaults, which a preset or a file may change:\n\n{config.reference()}",
    )
    described.add_argument(
        "--preset",
        metavar="NAME",
        help=f"start from a preset: {', '.join(config.presets())} (default: block94, unless --config is given)",
    )
    described.add_argument("--config", metavar="FILE", type=Path, help="a TOML file over the preset")
    described.add_argument("--run-dir", metavar="DIR", type=Path, help="run folder (default: runs/NAME-DIGEST)")
    described.add_argument("--quiet", action="store_true", help="no progress bar and no table: record.quiet=true")
    described.add_argument("settings", metavar="key=value", nargs="*", help="settings over both")
    return described


class _Parser(argparse.ArgumentParser):
    """An argument parser for a command that many ranks run."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 failed, 2 bad input, 75 asked to stop, with all saved."""
    outcome = Outcome()
    with ExitStack() as held:
        try:
            start = time.perf_counter()
            settings, run_dir = _checked(parser().parse_intermixed_args(arguments))
            with StopNow():
                waited, manifest = _prepared(settings)
            outcome.found_by = "one"
            from dist_train.run import Job, run  # imports torch, for seconds

            run(Job(settings, run_dir, manifest, waited, start), held, outcome)
        except (UserError, data_prep.DataError) as error:
            outcome.code, outcome.reason = BAD_INPUT, str(error)
            _say_once(outcome)
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
            if error.speaks:
                say(outcome.reason)
        except BaseException as error:
            outcome.reason = f"{type(error).__name__}: {error}"
            raise
    return outcome.code


def resolve(args: argparse.Namespace) -> tuple[str, config.Config]:
    """The name and the configuration that the command line asks for. Raises UserError."""
    preset = args.preset or (None if args.config else "block94")
    settings = [*args.settings, *(["record.quiet=true"] if args.quiet else [])]
    return preset or args.config.stem, config.load(preset, args.config, settings)


def _checked(args: argparse.Namespace) -> tuple[config.Config, Path]:
    """The configuration and the run folder, after every check that takes no more than these. Raises UserError."""
    name, settings = resolve(args)
    check_world_size(settings.train.microbatches)
    check_batch(settings.train.batch_size, settings.train.microbatches)
    run_dir = args.run_dir or _run_dir(name, settings)
    try:
        config.check_folder(run_dir, settings)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another folder") from None
    settings.data.check()
    return settings, run_dir


def _run_dir(name: str, settings: config.Config) -> Path:
    """The run folder where none is given, named by the configuration, and in a W&B sweep by the agent's run too: its
    members may have one configuration, and an agent that goes on with a run has the same."""
    folder = f"{name}-seed{settings.train.seed}-{config.digest(settings)}"
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return Path("runs") / (f"sweep-{sweep}/{folder}-{run}" if sweep and run else folder)


def _prepared(settings: config.Config) -> tuple[bool, data_prep.Manifest | None]:
    """Have the first rank of each node see to the betons, while the node's others wait. It is done here, since waiting
    in the process group has an end. Returns whether the betons had to be written, and on the first rank their manifest.
    Raises UserError, data_prep.DataError and LostPeerError."""
    stop_with_launcher()
    data, waited = settings.data, not settings.data.written
    if first_of_node():
        found = data.prepare()
        check_images(data, found, settings.train.batch_size)
        height, width, channels = found.image_shape
        for size in ((height, width), *((smaller.size, smaller.size) for smaller in data.smaller)):
            shapes(settings.model, (channels, *size))
        return waited, found
    start, said = time.monotonic(), os.environ["LOCAL_RANK"] != "1"
    while not data.written:
        if not said and time.monotonic() > start + _PATIENCE:
            say(f"{data.folder} is not there yet: the other ranks of this node wait for the first, which prepares it")
            said = True
        time.sleep(0.1)
    return waited, None


def _say_once(outcome: Outcome) -> None:
    """Say what was wrong, where another rank does not."""
    speaks = first_of_node() if outcome.found_by == "node" else os.environ.get("RANK", "0") == "0"
    # The one that speaks leaves at once, and the launcher then ends the others. One that left before it would have the
    # launcher end that one.
    if speaks or (not ended_within(_SPEAKING) and outcome.found_by == "one"):
        say(outcome.reason)


def _entry() -> None:
    # Ctrl-C ends the process without a traceback, until the training is there to be saved.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        code = main()
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
    _entry()
