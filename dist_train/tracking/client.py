"""Rank 0's client of the W&B process: starts it, sends it messages, and ends it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import show
from dist_train.runs.layout import WANDB
from dist_train.tracking import messages
from dist_train.tracking.messages import Artifact, Begin, End, Message, encode
from dist_train.tracking.variables import passed_on

CLOSE_TIMEOUT = messages.INIT_TIMEOUT + messages.FINISH_TIMEOUT + 10.0  # seconds that `close` waits at most
_WORKER = "dist_train.tracking.worker"


def process(first: Begin) -> dict[str, Any]:
    """Arguments of subprocess.Popen for a run's W&B process, which reads messages from its standard input."""
    return {
        "args": [sys.executable, "-m", _WORKER],
        "env": {
            "WANDB_ERROR_REPORTING": "false",  # otherwise even an offline run connects to W&B, and waits
            "WANDB_SILENT": "true",
            "WANDB_DATA_DIR": str(Path(first.run_dir, WANDB)),  # for files that wait for their upload
            # for the log of wandb's service process, which goes to the terminal where the home cannot be written
            "WANDB_CACHE_DIR": str(Path(first.run_dir, WANDB, "cache")),
            **passed_on(),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # so that it imports the same modules
        },
        "start_new_session": True,  # no Ctrl-C: rank 0 receives it, and ends this process
    }


class WandbRun:
    """Rank 0's connection to the run's W&B process. No method raises, and only `close` waits."""

    @classmethod
    def start(cls, first: Begin) -> WandbRun | None:
        """Start the W&B process of a run; None when its mode is `disabled`, or when it cannot be started, which is
        reported on stderr."""
        if first.mode == "disabled":
            return None
        try:
            worker = subprocess.Popen(**process(first), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        except OSError as error:
            show(f"W&B: not started ({error})", stream=sys.stderr)
            return None
        return cls(worker, first)

    def __init__(self, worker: subprocess.Popen[bytes], first: Begin) -> None:
        assert worker.stdin is not None
        self._process, self._pipe, self._torn = worker, worker.stdin, False
        self._folder = Path(first.run_dir, WANDB)
        self._send(first)
        os.set_blocking(self._pipe.fileno(), False)

    def summarize(self, summary: dict[str, Any], plots: Sequence[Path], evaluation: Path) -> None:
        """Send the results of a run that is done. plots, evaluation: paths of the plots and of `evaluation.json`."""
        self._send(messages.summary(summary, plots, evaluation))

    def artifact(self, checkpoint: Path) -> None:
        """Send the path of a checkpoint to keep as an artifact; in any thread."""
        self._send(Artifact(str(checkpoint.absolute())))

    def close(self, exit_code: int) -> None:
        """End the W&B run, and wait for that at most `CLOSE_TIMEOUT` seconds. exit_code: of rank 0."""
        self._send(End(exit_code))
        with contextlib.suppress(OSError):
            self._pipe.close()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()  # wandb's service process then ends, too
            self._process.wait()
            show(f"W&B: stopped, it did not finish in time; its files: {self._folder}", stream=sys.stderr)

    def _send(self, message: Message) -> None:
        data = encode(message)
        with contextlib.suppress(OSError):  # the process has ended, after a message on stderr
            if not self._torn:
                sent = self._pipe.write(data)  # None, or fewer bytes, where the process hangs and the pipe is full
                self._torn = sent is not None and sent < len(data)
