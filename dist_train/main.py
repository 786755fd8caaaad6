"""Train a block network.

    torchrun --nproc_per_node=4 -m dist_train.main --preset block94
    python -m dist_train.main --preset digits train.epochs=4 seed=1

The same run folder means resume; without --run-dir it is named by the configuration, so that the same command
goes on where it stopped. Settings are key=value with the names of config.toml; a key's last part alone will
do where it is unambiguous.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from dist_train import checkpoint, config, data_prep
from dist_train.data import Data, manifest
from dist_train.distributed import Ranks, check_world_size, on_main, ranks, sum_integers
from dist_train.environment import device_name, git_commit, matrix_rate, versions
from dist_train.errors import DivergedError, LostPeerError, UserError, say
from dist_train.files import write_atomic
from dist_train.model import BlockNetwork, flops, shapes
from dist_train.optim import Optimizers
from dist_train.record import best_eval, read_metrics
from dist_train.run_folder import Keeper, check_data, open_folder
from dist_train.startup import leave_out_compiler
from dist_train.stopping import StopRequest
from dist_train.system import sampled
from dist_train.train import DTYPES, build_model, total_steps, train, weights_digest

# Exit codes. The last is sysexits.h's EX_TEMPFAIL: the same command goes on.
DONE, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
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


@dataclass
class _Outcome:
    """How the command ends, known before its record is closed."""

    code: int = FAILED
    reason: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 failed, 2 bad input, 75 asked to stop, with all saved."""
    args = parser().parse_intermixed_args(arguments)
    outcome = _Outcome()
    with ExitStack() as held:
        try:
            _run(args, held, outcome)
        except (UserError, data_prep.DataError) as error:
            outcome.code, outcome.reason = BAD_INPUT, str(error)
            if os.environ.get("RANK", "0") != "0":
                # Rank 0 speaks for all, and the launcher ends the others when it leaves. Whoever is still there
                # after this is the only one that knows.
                time.sleep(10)
            say(outcome.reason)
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


def _run(args: argparse.Namespace, held: ExitStack, outcome: _Outcome) -> None:
    """held: what is to be closed when the outcome is known."""
    start = time.perf_counter()
    name, settings = resolve(args)
    check_world_size(settings.train.microbatches)
    run_dir = args.run_dir or _run_dir(name, settings)
    t = settings.train
    if not t.compile:
        leave_out_compiler()
    with ranks(t.device, t.threads, t.deterministic, t.timeout, t.backend) as here:
        # Not before: until all ranks are there a stop signal may as well end the process, and does so at once.
        stop = held.enter_context(StopRequest())
        found = on_main(here, lambda: manifest(settings.data))
        height, width, channels = found.image_shape
        shapes(settings.model, (channels, height, width))
        for smaller in settings.data.smaller:
            shapes(settings.model, (channels, smaller.size, smaller.size))
        data = Data(settings.data, found, here, t.batch_size, t.microbatches, t.seed)
        steps = total_steps(t, data)
        newest = on_main(here, lambda: open_folder(run_dir, settings, held))
        state = checkpoint.load(newest) if newest else None
        if state:
            check_data(state, found, run_dir)
        if newest and checkpoint.step_of(newest) == steps and (run_dir / "summary.json").exists():
            outcome.code = DONE
            if here.main:
                print(f"{run_dir} is finished already")
                _report(run_dir)
            return
        step = state["step"] if state else 0
        model = build_model(settings.model, t, data).to(here.device)
        optimizers = Optimizers(model, settings.optim, steps, data.steps_per_epoch)
        rate = _matrix_rate(here, t.precision)
        keeper = None
        if here.main:
            _announce(run_dir, settings, found, here, step, steps)
            keeper = Keeper(run_dir, settings, here, found, steps, rate, state)
            held.callback(lambda: keeper.close(outcome.code, outcome.reason))
        sampling = sampled(run_dir, here.rank, here.device) if settings.record.system == "all" else nullcontext()
        try:
            with sampling:
                step, stopped = train(
                    t,
                    settings.evaluate,
                    settings.checkpoint,
                    model,
                    optimizers,
                    data,
                    here,
                    state,
                    stop,
                    keeper.recorder if keeper else None,
                    keeper.writer if keeper else None,
                    settings.record.digest_every,
                )
        except DivergedError as error:
            if keeper:
                write_atomic(run_dir / "diverged.json", (json.dumps(error.details, indent=1) + "\n").encode())
            raise

        def finish() -> str:
            """On rank 0, when all is trained or stopped. Returns what could not be saved, and why."""
            assert keeper is not None
            if missing := keeper.last_checkpoint():
                return missing
            if stopped:
                return ""
            summary = _summary(settings, model, data, here, rate, run_dir)
            return keeper.finish({**summary, "seconds": time.perf_counter() - start})

        missing = on_main(here, finish)
        outcome.code = PREEMPTED if stopped else FAILED if missing else DONE
        outcome.reason = stopped or missing
        if here.main:
            if missing:
                say(
                    f"{run_dir}: {missing} could not be written; make room and start the same command again: it goes "
                    f"on from the newest checkpoint"
                )
            elif stopped:
                print(f"stopped by {stopped} after step {step}, all saved; the same command goes on from there")
            else:
                _report(run_dir)


def _run_dir(name: str, settings: config.Config) -> Path:
    """The run folder where none is given, named by the configuration, and in a W&B sweep by the agent's run too: its
    members may have one configuration, and an agent that goes on with a run has the same."""
    folder = f"{name}-seed{settings.train.seed}-{config.digest(settings)}"
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return Path("runs") / (f"sweep-{sweep}/{folder}-{run}" if sweep and run else folder)


def _matrix_rate(here: Ranks, precision: str) -> int:
    """Floating-point operations a second that all ranks together reach in matrix products at the same time."""
    mine = torch.tensor(int(matrix_rate(here.device, DTYPES[precision])), device=here.device)
    return int(sum_integers(here, mine).item())


def _announce(
    run_dir: Path,
    settings: config.Config,
    found: data_prep.Manifest,
    here: Ranks,
    step: int,
    total_steps: int,
) -> None:
    device = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "CPU"
    print(
        f"{found.dataset}: {found.splits['train'].count:,} training and {found.splits['test'].count:,} test images; "
        f"{here.world_size} rank{'s' * (here.world_size > 1)} on {device}, {settings.train.precision}; "
        f"{total_steps} steps in {settings.train.epochs:g} epochs; run folder {run_dir}",
        flush=True,
    )
    if step:
        print(f"going on after step {step}", flush=True)


def _summary(
    settings: config.Config,
    model: BlockNetwork,
    data: Data,
    here: Ranks,
    rate: int,
    run_dir: Path,
) -> dict[str, Any]:
    """rate: floating-point operations a second that all ranks reach together in a matrix product."""
    steps, evals = read_metrics(run_dir / "metrics.jsonl")
    last, best = evals[-1], best_eval(evals)
    assert best is not None
    train_seconds = sum(row["images"] / row["images_per_second"] for row in steps)
    height, width, channels = data.manifest.image_shape
    classes = len(data.manifest.classes)
    train_flops = sum(row["flops"] for row in steps)
    return {
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_accuracy": last["train_accuracy"],
        "train_loss": last["train_loss"],
        **{key: value for key, value in last.items() if key.startswith("val_") or key.endswith("_tta")},
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "epochs": settings.train.epochs,
        "steps": len(steps),
        "train_seconds": train_seconds,
        "images_per_second": sum(row["images"] for row in steps) / train_seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_image": sum(map(sum, flops(settings.model, (channels, height, width), classes))),
        "train_flops": train_flops,
        "matrix_flops_per_second": rate,
        "mfu": train_flops / train_seconds / rate,
        "weights_sha256": weights_digest(model),
        "config_digest": config.digest(settings),
        "world_size": here.world_size,
        "device": device_name(here.device),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _report(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    tta = f" ({100 * summary['test_accuracy_tta']:.2f} % with TTA)" if "test_accuracy_tta" in summary else ""
    print(
        f"{summary['dataset']}: test accuracy {100 * summary['test_accuracy']:.2f} %{tta} at the last epoch; "
        f"{summary['train_seconds']:.1f} s of training ({summary['images_per_second']:,.0f} images/s), "
        f"{summary['seconds']:.1f} s in all\n"
        f"curves: {run_dir / 'plots' / 'loss.png'}, {run_dir / 'plots' / 'accuracy.png'}; "
        f"record: {run_dir / 'metrics.jsonl'}, {run_dir / 'summary.json'}",
        flush=True,
    )


@record
def _entry() -> None:
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is on the disk, and the process group is left. The interpreter's own end would race with native threads
    # of gloo and ffcv, which now and then aborts a rank that has finished ("terminate called").
    os._exit(code)


if __name__ == "__main__":
    _entry()
