"""W&B runs made from the files of run folders, as their trainings would have sent them."""

from __future__ import annotations

import argparse
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
from dist_train.tracking.client import process
from dist_train.tracking.messages import Artifact, Begin, End, Message, begin, encode
from dist_train.tracking.messages import summary as summary_message

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
    first = begin(
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
    first.settings.update(
        {
            "run_id": uuid.uuid4().hex[:12],
            "finish_timeout": FINISH_TIMEOUT,
            "x_disable_machine_info": True,  # of this machine, now
            "disable_git": True,
            **({"entity": args.entity} if args.entity else {}),
        }
    )
    kept = [*run.checkpoints.values()]
    chosen = {"none": [], "last": kept[-1:] if run.done else [], "all": kept}[record.artifacts]
    pictures = [path for name in sorted(layout.PLOTS) if (path := run_dir / name).exists()]
    return [
        first,
        *(Artifact(str(path.absolute())) for path in chosen),
        *([summary_message(summary, pictures, run_dir / layout.EVALUATION)] if run.done else []),
        End(code_of(run.outcome)),
    ]


def send(run_dir: Path, messages: list[Message]) -> int:
    """Have a run's process take the messages, and say where the run is. Returns the exit code."""
    first = messages[0]
    assert isinstance(first, Begin)
    sent = subprocess.run(**process(first), input=b"".join(map(encode, messages)), stdout=subprocess.PIPE)
    if sent.stdout:
        print(f"{run_dir}: {sent.stdout.decode().strip()}", flush=True)
    return sent.returncode
