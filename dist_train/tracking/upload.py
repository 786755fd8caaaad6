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
from typing import Any

from dist_train import config
from dist_train.errors import PREEMPTED, UserError
from dist_train.files import claimed
from dist_train.runs.history import read_history
from dist_train.runs.layout import EVALUATION, METRICS, SUMMARY
from dist_train.runs.metrics import read_metrics
from dist_train.tracking.client import process
from dist_train.tracking.messages import Artifact, Begin, End, Message, begin, encode
from dist_train.tracking.messages import summary as summary_message

FINISH_TIMEOUT = 3600.0  # seconds for all to be uploaded


def messages(run_dir: Path, args: argparse.Namespace, held: ExitStack) -> list[Message]:
    """What a training says to its W&B run, from its folder, which is claimed until `held` is closed. Raises
    UserError."""
    for name in ("config.toml", METRICS):
        if not (run_dir / name).exists():
            raise UserError(f"{run_dir}: there is no {name} in it; name the folder of a run")
    try:
        held.enter_context(claimed(run_dir, 0.0))
        read_metrics(run_dir / METRICS)
    except BlockingIOError as error:
        raise UserError(f"{run_dir} is in use by {error}; wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be read and written ({error.strerror}); mend that") from None
    except ValueError as error:
        raise UserError(f"{run_dir}: {error}; put back the file that was written") from None

    settings = config.load(None, run_dir / "config.toml", [])
    done = (run_dir / SUMMARY).exists()
    summary: dict[str, Any] = json.loads((run_dir / SUMMARY).read_text()) if done else {}
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
    last = read_history(run_dir)[-1:]
    exit_code = {"done": 0, "preempted": PREEMPTED}.get(last[0].get("outcome", ""), 1) if last else 1
    kept = sorted((run_dir / "checkpoints").glob("step-*.pt"))
    chosen = {"none": [], "last": kept[-1:] if done else [], "all": kept}[record.artifacts]
    return [
        first,
        *(Artifact(str(path.absolute())) for path in chosen),
        *([summary_message(summary, sorted((run_dir / "plots").glob("*.png")), run_dir / EVALUATION)] if done else []),
        End(exit_code),
    ]


def send(run_dir: Path, messages: list[Message]) -> int:
    """Have a run's process take the messages, and say where the run is. Returns the exit code."""
    first = messages[0]
    assert isinstance(first, Begin)
    sent = subprocess.run(**process(first), input=b"".join(map(encode, messages)), stdout=subprocess.PIPE)
    if sent.stdout:
        print(f"{run_dir}: {sent.stdout.decode().strip()}", flush=True)
    return sent.returncode
