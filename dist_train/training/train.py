"""One run on this rank, from joining the process group to the summary."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dist_train.config import Config
from dist_train.config import digest as config_digest
from dist_train.config.settings import TrainConfig
from dist_train.data.batches import Data
from dist_train.data_prep import Manifest
from dist_train.distributed.device import DTYPES, autocast, matrix_rate
from dist_train.distributed.lazy_dynamo import skip_compiler_import
from dist_train.distributed.ranks import Ranks, gather_objects, join_ranks, on_main, sum_integers
from dist_train.errors import DONE, FAILED, PREEMPTED, DivergedError, Outcome, UserError, first_line, reason, say, show
from dist_train.files import write_atomic
from dist_train.model.network import BlockNetwork, weights_digest, whiten
from dist_train.model.shapes import flops
from dist_train.randomness import derive
from dist_train.runs import checkpoint
from dist_train.runs.contents import read_summary
from dist_train.runs.environment import environment, git_commit, machine, merged, versions
from dist_train.runs.folder import check_data, open_folder
from dist_train.runs.history import read_history
from dist_train.runs.layout import ACCURACY_PLOT, DIVERGED, LOSS_PLOT, METRICS, SUMMARY, step_of
from dist_train.runs.metrics import best_eval, read_metrics
from dist_train.signals import StopRequest
from dist_train.training.batch_norm import accuracy_by_mode
from dist_train.training.loop import State, train
from dist_train.training.run_writer import RunWriter, Writer
from dist_train.training.selection import Selection
from dist_train.training.system_metrics import sampled
from dist_train.training.warm_up import warm_up

# seconds to wait for ranks of other nodes where the betons were missing: those nodes may still be writing them
_DATA_TIMEOUT = 3600
_MODES_DIFFER = 0.05  # difference of the accuracies in training and evaluation mode that is worth a remark
_START_OVER = "restore it from a copy, remove it to resume from the one before it, or start in another folder"
_WHITENING_PIXELS = 5000 * 32 * 32  # pixels of training images from which a whitening stem is computed


def build_model(config: Config, data: Data) -> BlockNetwork:
    """The network with its initial weights, on the CPU; they depend on the configuration and the data set alone."""
    height, width, channels = data.manifest.image_shape
    torch.manual_seed(derive(config.train.seed, "init"))
    model = BlockNetwork(config.model, (channels, height, width), len(data.manifest.classes))
    if model.stem is not None and config.model.stem.kind == "whiten":
        whiten(model.stem, data.sample(max(1, _WHITENING_PIXELS // (height * width))))
    return model


@dataclass(frozen=True)
class Job:
    """A training whose input is checked. manifest: of the betons, None on all but the first rank of each node. waited:
    whether the betons had to be written first. start: time.perf_counter at the start of the command, in seconds."""

    config: Config
    run_dir: Path
    manifest: Manifest | None
    waited: bool
    start: float


def run(job: Job, held: ExitStack, outcome: Outcome) -> None:
    """Train on this rank to the last step or a stop, and set `outcome`.

    held: receives the contexts that are closed once `outcome` is set. Raises UserError, DivergedError and
    LostPeerError."""
    get_error_handler().initialize()  # prints a stack trace where native code crashes
    config, run_dir = job.config, job.run_dir
    t = config.train
    if not t.compile:
        skip_compiler_import()
    first_timeout = _DATA_TIMEOUT if job.waited else 0
    with join_ranks(t.device, t.threads, t.deterministic, t.timeout, t.backend, first_timeout) as ranks:
        # Entered only after all ranks have joined: until then there is nothing to save, and a stop signal ends the
        # process at once.
        stop = held.enter_context(StopRequest())
        manifest = on_main(ranks, lambda: job.manifest)
        assert manifest is not None
        data = Data(config.data, t, manifest, ranks)
        newest = on_main(ranks, lambda: open_folder(run_dir, config, held))
        resumed = checkpoint.read(newest, _START_OVER) if newest else None
        if resumed:
            check_data(resumed, manifest, run_dir)
        if newest and step_of(newest) == data.total_steps and (run_dir / SUMMARY).exists():
            outcome.code = DONE
            if ranks.main:
                show(f"{run_dir} is finished already")
                _print_result(run_dir, manifest.dataset)
            return

        model = build_model(config, data)
        # those of rank 0: processors of another kind compute whitening kernels whose last bits differ
        model.load_state_dict(on_main(ranks, model.state_dict))
        model.to(ranks.device)
        state = State.start(config, model, data.total_steps, data.images)
        if newest and resumed:
            try:
                if resumed.step != step_of(newest):
                    raise ValueError(f"it is of step {resumed.step}")
                state.load(resumed)
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{newest} does not fit this run ({first_line(error)}); {_START_OVER}") from None
        rate = _matrix_rate(ranks, t.precision)
        everyone = gather_objects(ranks, (environment(ranks.device), machine(ranks.device)))
        writer = Writer()
        if ranks.main:
            device = merged([each for each, _ in everyone])["device"] if ranks.on_gpu else "CPU"
            _announce(run_dir, config, manifest, ranks.world_size, device, state.step, data.total_steps)
            writer = main_writer = RunWriter(
                run_dir, config, ranks, manifest, data.total_steps, rate, resumed, everyone
            )
            held.callback(lambda: main_writer.close(outcome.code, outcome.reason))
        writer.phase("warming up")
        warm_up_seconds = warm_up(config, data, ranks, state)
        sampling = sampled(run_dir, ranks.rank, ranks.device) if config.record.system == "all" else nullcontext()
        try:
            with sampling:
                stopped = train(config, data, ranks, state, writer, stop)
                remark = "" if stopped else _on_modes(state, data, ranks, config.train)
        except DivergedError as error:
            if ranks.main:
                try:
                    write_atomic(run_dir / DIVERGED, (json.dumps(error.details, indent=1) + "\n").encode())
                except OSError as failure:
                    say(f"{run_dir / DIVERGED} cannot be written ({reason(failure)})")
            raise

        def finish() -> str:
            """Complete the files of the run, on rank 0. Returns "", or what could not be written, and why."""
            if (missing := main_writer.wait()) or stopped:
                return missing
            summary = _summary(config, model, data, ranks, rate, run_dir)
            times = {"seconds": time.perf_counter() - job.start, "warm_up_seconds": warm_up_seconds}
            return main_writer.finish({**summary, "device": main_writer.environments[-1]["device"], **times})

        missing = on_main(ranks, finish)
        outcome.code = FAILED if missing else PREEMPTED if stopped else DONE
        outcome.reason = f"{missing} could not be written" if missing else stopped
        if not ranks.main:
            return
        if missing:
            say(
                f"{run_dir}: {missing} could not be written; make room, or remove the cause, and start the same "
                f"command again: it resumes from the newest checkpoint"
            )
        elif stopped:
            show(f"stopped by {stopped} after step {state.step}, checkpoint saved; the same command resumes there")
        else:
            _print_result(run_dir, manifest.dataset)
            if remark:
                say(remark)


def _on_modes(state: State, data: Data, ranks: Ranks, settings: TrainConfig) -> str:
    """A remark on a network that is better with the BatchNorm statistics of each microbatch than in evaluation, else
    ""."""
    model, cast = state.model, autocast(ranks.device, settings.precision)
    selection = Selection(settings, data, model, state.losses)
    training, evaluation, images = accuracy_by_mode(model, selection, ranks, cast, state.step)
    if training - evaluation < _MODES_DIFFER:
        return ""
    kept = selection.kept(state.step - 1)
    remedy = "raise train.batch_size, or lower train.microbatches"
    return (
        f"of the same {images:,} training images {100 * training:.1f} % are classified "
        f"correctly with the BatchNorm statistics of each microbatch, as in training, and {100 * evaluation:.1f} % in "
        f"evaluation; microbatches, of which {kept} image{'s are' if kept > 1 else ' is'} trained on, are too small "
        f"for this network: {remedy if kept == data.size else 'raise train.select.fraction, ' + remedy}"
    )


def _matrix_rate(ranks: Ranks, precision: str) -> int:
    """FLOP/s of matrix products on all ranks together, measured at the same time."""
    own = torch.tensor(int(matrix_rate(ranks.device, DTYPES[precision])), device=ranks.device)
    return int(sum_integers(ranks, own).item())


def _announce(
    run_dir: Path,
    config: Config,
    manifest: Manifest,
    world_size: int,
    device: str,
    step: int,
    total_steps: int,
) -> None:
    training, test = (f"{manifest.splits[split].count:,}" for split in ("train", "test"))
    show(
        f"{manifest.dataset}: {training} training and {test} test images; "
        f"{world_size} rank{'s' * (world_size > 1)} on {device}, {config.train.precision}; "
        f"{total_steps} steps in {config.train.epochs:g} epochs; run folder {run_dir}"
    )
    if config.train.select.words:
        show(f"training on {config.train.select.words}; train loss and train acc are of these images")
    if step:
        show(f"resuming after step {step}")


def _summary(
    config: Config,
    model: BlockNetwork,
    data: Data,
    ranks: Ranks,
    rate: int,
    run_dir: Path,
) -> dict[str, Any]:
    """The content of `summary.json` but the times, `device`, `environments` and `dataset`. rate: FLOP/s of matrix
    products on all ranks together."""
    steps, evals = read_metrics(run_dir / METRICS)
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
        "epochs": config.train.epochs,
        "steps": len(steps),
        "train_seconds": train_seconds,
        "images_per_second": sum(row["images"] for row in steps) / train_seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_image": sum(map(sum, flops(config.model, (channels, height, width), classes))),
        "train_flops": train_flops,
        "matrix_flops_per_second": rate,
        "mfu": train_flops / train_seconds / rate,
        "equal_images": equal.count if (equal := data.manifest.equal_images) else None,
        "weights_sha256": weights_digest(model),
        "config_digest": config_digest(config),
        "world_size": ranks.world_size,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _print_result(run_dir: Path, dataset: str) -> None:
    summary = read_summary(run_dir)
    assert summary is not None
    tta = f" ({100 * summary['test_accuracy_tta']:.2f} % with TTA)" if "test_accuracy_tta" in summary else ""
    starts = [row.get("step") for row in read_history(run_dir) if row["event"] == "start"]
    since = "since it was resumed" if any(starts[-1:]) else "in all"
    show(
        f"{dataset}: test accuracy {100 * summary['test_accuracy']:.2f} %{tta} at the last epoch; "
        f"{summary['train_seconds']:.1f} s of training ({summary['images_per_second']:,.0f} images/s), "
        f"{summary.get('seconds', 0.0):.1f} s {since}",
        f"curves: {run_dir / LOSS_PLOT}, {run_dir / ACCURACY_PLOT}; metrics: {run_dir / METRICS}, {run_dir / SUMMARY}",
    )
