"""W&B runs from run folders, with what their trainings would have sent."""

from __future__ import annotations

import argparse
import math
import subprocess
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dist_train import config
from dist_train.command_line import check_path
from dist_train.errors import UserError, code_of, show
from dist_train.files import claimed
from dist_train.runs import layout
from dist_train.runs.run import Run
from dist_train.tracking.client import process
from dist_train.tracking.messages import Artifact, Begin, End, Message, begin, encode
from dist_train.tracking.messages import summary as summary_message
from dist_train.tracking.variables import resolved

FINISH_TIMEOUT = 3600.0  # seconds for the whole upload


def messages(run_dir: Path, args: argparse.Namespace, locks: ExitStack) -> list[Message]:
    """The messages that the training in a run folder would have sent to its W&B run. The folder is locked until `locks`
    is closed. args: project, entity, offline, of the command line. Raises UserError for a folder that is in use, lacks
    files, or has damaged ones."""
    check_path("RUN_DIR", run_dir)
    run = Run(run_dir)
    run.need(layout.SETTINGS, layout.METRICS)
    try:
        locks.enter_context(claimed(layout.lock_path(run_dir), 0.0))
    except BlockingIOError as error:
        raise UserError(f"{run_dir} is in use by {error}; wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); change its permissions") from None

    run.check()  # the process of the W&B run reads some of the files itself, and could only fail
    settings, summary = run.settings, run.summary
    record = replace(
        settings.record,
        wandb="offline" if args.offline else "online",
        project=args.project or settings.record.project,
        name=run.name,  # of its own, where there are several
        system="all",  # the system metrics of every rank in the folder
        quiet=True,  # no table is printed
    )
    resolved(record, "--project" if args.project else "record.project")
    begin_message = begin(
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
    begin_message.settings.update(
        {
            "run_id": uuid.uuid4().hex[:12],
            "finish_timeout": FINISH_TIMEOUT,
            "x_disable_machine_info": True,  # the run may have been on another machine
            "disable_git": True,
            **({"entity": args.entity} if args.entity else {}),
        }
    )
    checkpoints = [*run.checkpoints.values()]
    artifacts = {"none": [], "last": checkpoints[-1:] if run.done else [], "all": checkpoints}[record.artifacts]
    plots = [path for name in sorted(layout.PLOTS) if (path := run_dir / name).exists()]
    return [
        begin_message,
        *(Artifact(str(path.absolute())) for path in artifacts),
        *([summary_message(summary, plots, run_dir / layout.EVALUATION)] if run.done else []),
        End(code_of(run.outcome)),
    ]


def send(run_dir: Path, messages: list[Message]) -> int:
    """Send the messages to a process for one W&B run, and print where that is. Returns the process's exit code."""
    begin_message = messages[0]
    assert isinstance(begin_message, Begin)
    finished = subprocess.run(**process(begin_message), input=b"".join(map(encode, messages)), stdout=subprocess.PIPE)
    if finished.stdout:
        show(f"{run_dir}: {finished.stdout.decode().strip()}")
    return finished.returncode
