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
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import data_prep
from dist_train import __version__, checkpoint, config, plots
from dist_train.data import Data, manifest
from dist_train.distributed import Ranks, check_world_size, on_main, ranks
from dist_train.errors import DivergedError, UserError
from dist_train.files import write_atomic
from dist_train.model import BlockNetwork, flops_per_image, shapes
from dist_train.optim import Optimizers
from dist_train.record import Recorder, best_eval, read_metrics
from dist_train.train import build_model, train, weights_digest


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m dist_train.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    described.add_argument(
        "--preset",
        metavar="NAME",
        help=f"start from a preset: {', '.join(config.presets())} (default: block94, unless --config is given)",
    )
    described.add_argument("--config", metavar="FILE", type=Path, help="a TOML file over the preset")
    described.add_argument("--run-dir", metavar="DIR", type=Path, help="run folder (default: runs/NAME-DIGEST)")
    described.add_argument("settings", metavar="key=value", nargs="*", help="settings over both")
    return described


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 failed, 2 bad input."""
    args = parser().parse_intermixed_args(arguments)
    try:
        return _run(args)
    except (UserError, data_prep.DataError) as error:
        code = 2
        message = str(error)
    except DivergedError as error:
        code = 1
        message = str(error)
    if os.environ.get("RANK", "0") != "0":
        # Rank 0 speaks for all, and the launcher ends the others when it leaves. Whoever is still there after
        # this is the only one that knows.
        time.sleep(10)
    print(f"dist_train: {message}", file=sys.stderr, flush=True)
    return code


def resolve(args: argparse.Namespace) -> tuple[str, config.Config]:
    """The name and the configuration that the command line asks for. Raises UserError."""
    preset = args.preset or (None if args.config else "block94")
    return preset or args.config.stem, config.load(preset, args.config, args.settings)


def _run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    name, settings = resolve(args)
    check_world_size(settings.train.microbatches)
    run_dir = args.run_dir or Path("runs") / f"{name}-seed{settings.train.seed}-{config.digest(settings)}"
    t = settings.train
    with ranks(t.device, t.threads, t.deterministic, t.timeout) as here:
        found = on_main(here, lambda: manifest(settings.data))
        height, width, channels = found.image_shape
        shapes(settings.model, (channels, height, width))
        data = Data(settings.data, found, here, t.batch_size, t.microbatches, t.seed)
        total_steps = t.epochs * data.steps_per_epoch
        start_from = on_main(here, lambda: _open(run_dir, settings))
        step = checkpoint.step_of(start_from) if start_from else 0
        if step == total_steps and (run_dir / "summary.json").exists():
            if here.main:
                print(f"{run_dir} is finished already")
                _report(run_dir)
            return 0
        model = build_model(settings.model, t, data).to(here.device)
        optimizers = Optimizers(model, settings.optim, total_steps, data.steps_per_epoch)
        recorder = None
        if here.main:
            _announce(run_dir, settings, found, here, step, total_steps)
            recorder = Recorder(
                run_dir,
                settings.record,
                dataset=found.dataset,
                run_config=config.to_dict(settings),
                total_steps=total_steps,
                resume_step=step,
            )
        code = 1
        try:
            train(t, settings.checkpoint, model, optimizers, data, here, run_dir, start_from, recorder)
            if recorder is not None:
                summary = _summary(settings, model, data, here, run_dir)
                recorder.finish({**summary, "seconds": time.perf_counter() - start}, plots.draw)
            code = 0
        finally:
            if recorder is not None:
                recorder.close(code)
        if here.main:
            _report(run_dir)
        return code


def _open(run_dir: Path, settings: config.Config) -> Path | None:
    """Make or check the run folder. Returns its newest whole checkpoint, None without one."""
    path = run_dir / "config.toml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            differing = config.difference(settings, config.load(None, path, []))
            if differing:
                raise UserError(
                    f"--run-dir {run_dir} belongs to a run with another {', '.join(differing)}; "
                    f"give the settings it was started with, or another folder"
                )
        write_atomic(path, config.to_toml(settings).encode())
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another folder") from None
    return checkpoint.newest(run_dir / "checkpoints")


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
        f"{total_steps} steps in {settings.train.epochs} epochs; run folder {run_dir}",
        flush=True,
    )
    if step:
        print(f"going on after step {step}", flush=True)


def _summary(settings: config.Config, model: BlockNetwork, data: Data, here: Ranks, run_dir: Path) -> dict[str, Any]:
    steps, evals = read_metrics(run_dir / "metrics.jsonl")
    last, best = evals[-1], best_eval(evals)
    assert best is not None
    train_seconds = sum(row["images"] / row["images_per_second"] for row in steps)
    height, width, channels = data.manifest.image_shape
    packages = ("torch", "torchvision", "ffcv", "numpy", "wandb")
    return {
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_accuracy": last["train_accuracy"],
        "train_loss": last["train_loss"],
        **{key: last[key] for key in ("val_accuracy", "val_loss") if key in last},
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "epochs": settings.train.epochs,
        "steps": len(steps),
        "train_seconds": train_seconds,
        "images_per_second": sum(row["images"] for row in steps) / train_seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_image": flops_per_image(model.eval(), (channels, height, width)),
        "weights_sha256": weights_digest(model),
        "config_digest": config.digest(settings),
        "world_size": here.world_size,
        "device": torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else _processor(),
        "versions": {
            "python": platform.python_version(),
            "dist_train": __version__,
            **{package: version(package) for package in packages},
            "cuda": torch.version.cuda,
        },
        "git_commit": _git_commit(),
    }


def _report(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    print(
        f"{summary['dataset']}: test accuracy {100 * summary['test_accuracy']:.2f} % at the last epoch; "
        f"{summary['train_seconds']:.1f} s of training ({summary['images_per_second']:,.0f} images/s), "
        f"{summary['seconds']:.1f} s in all\n"
        f"curves: {run_dir / 'plots' / 'loss.png'}, {run_dir / 'plots' / 'accuracy.png'}; "
        f"record: {run_dir / 'metrics.jsonl'}, {run_dir / 'summary.json'}",
        flush=True,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit this code is at, with a + when files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changes.stdout.strip() else "")


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
