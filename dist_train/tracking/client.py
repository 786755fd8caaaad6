"""Rank 0's end of the W&B process: what it is told, and how it is started and ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.config.settings import RecordConfig
from dist_train.runs.layout import METRICS, SAMPLES

INIT_TIMEOUT = 5.0  # seconds for the server to answer before the run goes offline

FINISH_TIMEOUT = 15.0  # seconds for what is still to upload at the end

CLOSE_TIMEOUT = INIT_TIMEOUT + FINISH_TIMEOUT + 10.0  # seconds `close` waits at the very most

Message = dict[str, Any]


def beginning(
    run_dir: Path,
    record: RecordConfig,
    *,
    config: dict[str, Any],
    branches: Sequence[Sequence[str]],
    offset: int,
    matrix_rate: float,
) -> Message:
    """The first message of a run.

    Args:
        run_dir: the run folder, with a `metrics.jsonl`. Files go to its `wandb/`, with the run's id: a restart or a
            move continues it.
        config: the configuration to show, of values that JSON has.
        branches: for each block the names of its convolutions.
        offset: what a run that is continued has had of `metrics.jsonl`, in bytes; the lines after are passed on as
            they come.
        matrix_rate: floating-point operations a second of matrix products on all ranks; nan for no MFU.
    """
    run_dir = run_dir.absolute()
    samples = {str(path.relative_to(run_dir)): path.stat().st_size for path in run_dir.glob(SAMPLES)}
    settings = {
        "project": record.project,
        "run_name": record.name or run_dir.resolve().name,
        **({"run_group": record.group} if record.group else {}),  # unset, the environment's count
        **({"run_tags": list(record.tags)} if record.tags else {}),
        "resume": "allow",  # never with step=: W&B drops the rows of a step that is replayed
        "root_dir": str(run_dir),
        "console": "off",
        "silent": True,
        "program": sys.argv[0],
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
        "finish_timeout_raises": True,
        "x_stats_pid": os.getpid(),
        "x_transaction_log_flush_interval": 1.0,  # a killed run loses a second, not fifteen
    }
    return {
        "run_dir": str(run_dir),
        "mode": record.wandb,
        "settings": settings,
        "config": config,
        "branches": [list(names) for names in branches],
        "matrix_rate": matrix_rate,
        "seen": {METRICS: offset, **samples},  # bytes, by file
        "samples": record.system == "all",
    }


def closing(summary: dict[str, Any], pictures: Sequence[Path], evaluation: Path) -> Message:
    """The message with what there is at the end: the final values, the plots, each an image under its file's name, and
    the path of `evaluation.json`, if it is there."""
    return {
        "summary": summary,
        "pictures": [str(picture.absolute()) for picture in pictures],
        "evaluation": str(evaluation.absolute()) if evaluation.exists() else None,
    }


def process(first: Message) -> dict[str, Any]:
    """Arguments for `subprocess` to start a run's process, which reads its messages, a line each."""
    return {
        "args": [sys.executable, "-m", __name__],
        "env": {
            "WANDB_ERROR_REPORTING": "false",  # else even an offline run calls home, and waits for it
            "WANDB_SILENT": "true",
            "WANDB_DATA_DIR": str(Path(first["run_dir"], "wandb")),  # where what is to be uploaded waits
            **{name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},  # a sweep agent's helper
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # what this process can import
        },
        "start_new_session": True,  # Ctrl-C is for rank 0, which then ends this one
    }


class WandbRun:
    """Rank 0's end of the run's process. No method raises, and none but `close` waits."""

    @classmethod
    def start(cls, first: Message) -> WandbRun | None:
        """Begin the run that `beginning` describes; None when its mode is auto and the environment says
        WANDB_MODE=disabled."""
        if first["mode"] == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            return None
        try:
            started = subprocess.Popen(**process(first), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        except OSError as error:
            tell(f"W&B: not started ({error})")
            return None
        return cls(started, first)

    def __init__(self, started: subprocess.Popen[bytes], first: Message) -> None:
        assert started.stdin is not None
        self._process, self._pipe, self._torn = started, started.stdin, False
        self._where = Path(first["run_dir"], "wandb")
        self._send(first)
        os.set_blocking(self._pipe.fileno(), False)

    def summarize(self, summary: dict[str, Any], pictures: Sequence[Path], evaluation: Path) -> None:
        """Hand over what `closing` describes."""
        self._send(closing(summary, pictures, evaluation))

    def artifact(self, checkpoint: Path) -> None:
        """Hand over the path of a checkpoint; in any thread."""
        self._send({"artifact": str(checkpoint.absolute())})

    def close(self, exit_code: int) -> None:
        """End the run, and wait for that for `CLOSE_TIMEOUT` seconds at most."""
        self._send({"exit_code": exit_code})
        with contextlib.suppress(OSError):
            self._pipe.close()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()  # wandb's own helper sees that, and ends too
            self._process.wait()
            tell(f"W&B: stopped, it did not come to an end; what it has: {self._where}")

    def _send(self, message: Message) -> None:
        data = json.dumps(message, default=str).encode() + b"\n"
        with contextlib.suppress(OSError):  # it has ended, and has said why
            if not self._torn:
                sent = self._pipe.write(data)  # None or a part where the process hangs and the pipe is full
                self._torn = sent is not None and sent < len(data)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def tell(sentence: str) -> None:
    wipe = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress bar comes back by itself
    print(f"{wipe}{sentence}", file=sys.stderr, flush=True)
