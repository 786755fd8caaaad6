"""W&B runs made from the files of run folders, as their trainings would have sent them."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dist_train import config
from dist_train.errors import UserError, code_of
from dist_train.files import claimed
from dist_train.runs import layout
from dist_train.runs.run import Run
from dist_train.tracking.client import Message, beginning, closing, process

FINISH_TIMEOUT = 3600.0  # seconds for all to be uploaded


def messages(run_dir: Path, args: argparse.Namespace, held: ExitStack) -> list[Message]:
    """What a training says to its W&B run, from its folder, which is claimed until `held` is closed. Raises
    UserError."""
    run = Run(run_dir)
    run.need(layout.SETTINGS, layout.METRICS)
    try:
        held.enter_context(claimed(layout.lock_path(run_dir), 0.0))
    except BlockingIOError as error:
        raise UserError(f"{run_dir} is in use by {error}; wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); change its permissions") from None

    run.check()  # W&B's process reads some of the files itself, and could only give up
    settings, summary = run.settings, run.summary
    record = replace(
        settings.record,
        wandb="offline" if args.offline else "online",
        project=args.project or settings.record.project,
        system="all",  # if there are samples
    )
    first = beginning(
        run_dir,
        record,
        config={
            **config.to_dict(settings),
            "code": {key: summary.get(key) for key in ("git_commit", "versions")},
        },
        branches=[[conv.name for conv in block.convolutions] for block in settings.model.blocks],
        offset=0,
        matrix_rate=summary.get("matrix_flops_per_second", math.nan),
    )
    first["settings"] |= {
        "run_id": uuid.uuid4().hex[:12],
        "finish_timeout": FINISH_TIMEOUT,
        "x_disable_machine_info": True,  # of this machine, now
        "disable_git": True,
        **({"entity": args.entity} if args.entity else {}),
    }
    kept = [*run.checkpoints.values()]
    chosen = {"none": [], "last": kept[-1:] if run.done else [], "all": kept}[record.artifacts]
    pictures = [path for name in sorted(layout.PLOTS) if (path := run_dir / name).exists()]
    return [
        first,
        *({"artifact": str(path.absolute())} for path in chosen),
        *([closing(summary, pictures, run_dir / layout.EVALUATION)] if run.done else []),
        {"exit_code": code_of(run.outcome)},
    ]


def send(run_dir: Path, messages: list[Message]) -> int:
    """Have a run's process take the messages, and say where the run is. Returns the exit code."""
    text = "".join(json.dumps(message, default=str) + "\n" for message in messages)
    sent = subprocess.run(**process(messages[0]), input=text, stdout=subprocess.PIPE, text=True)
    if sent.stdout:
        print(f"{run_dir}: {sent.stdout.strip()}", flush=True)
    return sent.returncode
