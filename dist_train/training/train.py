"""One run, from the process group to the summary, on this rank."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dist_train import config, data_prep
from dist_train.config.settings import ModelConfig, TrainConfig
from dist_train.data.batches import Data
from dist_train.distributed.device import DTYPES, matrix_rate
from dist_train.distributed.lazy_dynamo import leave_out_compiler
from dist_train.distributed.ranks import Ranks, on_main, ranks, sum_integers
from dist_train.errors import DONE, FAILED, PREEMPTED, DivergedError, Outcome, say
from dist_train.files import write_atomic
from dist_train.model.network import BlockNetwork, weights_digest, whiten
from dist_train.model.shapes import flops
from dist_train.randomness import derive
from dist_train.reports.statistics import best_eval
from dist_train.runs import checkpoint
from dist_train.runs.environment import device_name, git_commit, versions
from dist_train.runs.folder import check_data, open_folder
from dist_train.runs.metrics import read_metrics
from dist_train.signals import StopRequest
from dist_train.training.loop import train
from dist_train.training.optimizers import Optimizers
from dist_train.training.run_writer import Keeper
from dist_train.training.system_metrics import sampled

_WHITENING_PIXELS = 5000 * 32 * 32


def total_steps(settings: TrainConfig, data: Data) -> int:
    """Steps of the whole run; the last epoch's fraction is rounded up to whole ones."""
    return math.ceil(settings.epochs * data.steps_per_epoch)


def build_model(architecture: ModelConfig, settings: TrainConfig, data: Data) -> BlockNetwork:
    """The network with its initial weights, a function of the seed and the data set, on the CPU."""
    height, width, channels = data.manifest.image_shape
    torch.manual_seed(derive(settings.seed, "init"))
    model = BlockNetwork(architecture, (channels, height, width), len(data.manifest.classes), settings.microbatches)
    if model.stem is not None and architecture.stem.kind == "whiten":
        whiten(model.stem, data.sample(max(1, _WHITENING_PIXELS // (height * width))))
    return model


# Seconds that a rank whose node had no betons waits for ranks of other nodes, which may still be writing theirs.
_DATA = 3600


@dataclass(frozen=True)
class Job:
    """What is to be done, checked. manifest: of the betons, on the first rank of each node. waited: whether they had to
    be written first. start: when the command began, by time.perf_counter."""

    settings: config.Config
    run_dir: Path
    manifest: data_prep.Manifest | None
    waited: bool
    start: float


def run(job: Job, held: ExitStack, outcome: Outcome) -> None:
    """Train on this rank until all is done or stopped, and note in `outcome` how it ends. held: what is to be closed
    when that is known. Raises UserError, data_prep.DataError, DivergedError and LostPeerError."""
    get_error_handler().initialize()  # prints where native code crashed
    settings, run_dir = job.settings, job.run_dir
    t = settings.train
    if not t.compile:
        leave_out_compiler()
    with ranks(t.device, t.threads, t.deterministic, t.timeout, t.backend, _DATA if job.waited else 0) as here:
        # Not before: until all ranks are there a stop signal may as well end the process, and does so at once.
        stop = held.enter_context(StopRequest())
        outcome.found_by = "all"
        found = on_main(here, lambda: job.manifest)
        assert found is not None
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
            return keeper.finish({**summary, "seconds": time.perf_counter() - job.start})

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
