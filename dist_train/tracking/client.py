"""Rank 0's end of the W&B process: how it is started, told about the run, and ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.runs.layout import WANDB
from dist_train.tracking import messages
from dist_train.tracking.messages import Artifact, Begin, End, Message, encode

CLOSE_TIMEOUT = messages.INIT_TIMEOUT + messages.FINISH_TIMEOUT + 10.0  # seconds `close` waits at the very most
_WORKER = "dist_train.tracking.worker"


def process(first: Begin) -> dict[str, Any]:
    """Arguments for `subprocess` to start a run's process, which reads its messages, a line each."""
    return {
        "args": [sys.executable, "-m", _WORKER],
        "env": {
            "WANDB_ERROR_REPORTING": "false",  # else even an offline run calls home, and waits for it
            "WANDB_SILENT": "true",
            "WANDB_DATA_DIR": str(Path(first.run_dir, WANDB)),  # where what is to be uploaded waits
            **{name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},  # a sweep agent's helper
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # what this process can import
        },
        "start_new_session": True,  # Ctrl-C is for rank 0, which then ends this one
    }


class WandbRun:
    """Rank 0's end of the run's process. No method raises, and none but `close` waits."""

    @classmethod
    def start(cls, first: Begin) -> WandbRun | None:
        """Start the W&B process of a run; None when its mode is auto and the environment says WANDB_MODE=disabled."""
        if first.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            return None
        try:
            started = subprocess.Popen(**process(first), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        except OSError as error:
            tell(f"W&B: not started ({error})")
            return None
        return cls(started, first)

    def __init__(self, started: subprocess.Popen[bytes], first: Begin) -> None:
        assert started.stdin is not None
        self._process, self._pipe, self._torn = started, started.stdin, False
        self._where = Path(first.run_dir, WANDB)
        self._send(first)
        os.set_blocking(self._pipe.fileno(), False)

    def summarize(self, summary: dict[str, Any], pictures: Sequence[Path], evaluation: Path) -> None:
        """Hand over what there is at the end of a run that is done; evaluation: the path of `evaluation.json`."""
        self._send(messages.summary(summary, pictures, evaluation))

    def artifact(self, checkpoint: Path) -> None:
        """Hand over the path of a checkpoint; in any thread."""
        self._send(Artifact(str(checkpoint.absolute())))

    def close(self, exit_code: int) -> None:
        """End the run, and wait for that for `CLOSE_TIMEOUT` seconds at most."""
        self._send(End(exit_code))
        with contextlib.suppress(OSError):
            self._pipe.close()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()  # wandb's own helper sees that, and ends too
            self._process.wait()
            tell(f"W&B: stopped, it did not come to an end; what it has: {self._where}")

    def _send(self, message: Message) -> None:
        data = encode(message)
        with contextlib.suppress(OSError):  # it has ended, and has said why
            if not self._torn:
                sent = self._pipe.write(data)  # None or a part where the process hangs and the pipe is full
                self._torn = sent is not None and sent < len(data)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def tell(sentence: str) -> None:
    """Print a sentence to stderr, over a progress bar."""
    wipe = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress bar comes back by itself
    print(f"{wipe}{sentence}", file=sys.stderr, flush=True)
