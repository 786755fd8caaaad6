"""The run in Weights & Biases: a process beside rank 0 that reads the record and passes it on.

A process of its own, because wandb's calls can block for good (`log` too, once wandb's helper hangs), and
because a row costs a third of a millisecond of Python, which rank 0 needs to launch its kernels. Rank 0 only
tells it where the record is, the summary, and the end. If rank 0 dies, it brings the run to its end.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

INIT_TIMEOUT = 5.0  # seconds for the server to answer before the run goes offline
FINISH_TIMEOUT = 15.0  # seconds for what is still to upload at the end
CLOSE_TIMEOUT = INIT_TIMEOUT + FINISH_TIMEOUT + 10.0  # seconds `close` waits at the very most
POLL = 0.5  # seconds between two looks at the record

Message = dict[str, Any]


class WandbRun:
    """Rank 0's end of the run's process. No method raises, and none but `close` waits."""

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        mode: str,
        project: str,
        group: str,
        name: str,
        tags: Sequence[str],
        config: dict[str, Any],
        metrics: Path,
        offset: int,
        matrix_rate: float,
    ) -> WandbRun | None:
        """Begin the run; None when `mode` is auto and the environment says WANDB_MODE=disabled.

        Args:
            run_dir: files go to `run_dir/wandb`, with the run's id: a restart or a move continues it.
            mode: auto (WANDB_MODE if set, else online when logged in, else offline), online or offline.
            config: the configuration to show, of values that JSON has.
            metrics: the record; its lines from byte `offset` on are passed on as they come.
            matrix_rate: floating-point operations a second of matrix products on all ranks, for MFU.
        """
        if mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            return None
        where = run_dir.absolute() / "wandb"
        environment = {
            "WANDB_ERROR_REPORTING": "false",  # else even an offline run calls home, and waits for it
            "WANDB_SILENT": "true",
            "WANDB_DATA_DIR": str(where),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # what this process can import
        }
        settings = {
            "project": project,
            "run_name": name,
            **({"run_group": group} if group else {}),  # unset, the environment's count
            **({"run_tags": list(tags)} if tags else {}),
            "resume": "allow",  # never with step=: W&B drops the rows of a step that is replayed
            "root_dir": str(run_dir.absolute()),
            "console": "off",
            "silent": True,
            "program": sys.argv[0],
            "init_timeout": INIT_TIMEOUT,
            "finish_timeout": FINISH_TIMEOUT,
            "finish_timeout_raises": True,
            "x_stats_pid": os.getpid(),
            "x_transaction_log_flush_interval": 1.0,  # a killed run loses a second, not fifteen
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for rank 0, which then ends this one
            )
        except OSError as error:
            _tell(f"W&B: not started ({error})")
            return None
        run = cls(process, where)
        run._send(
            where=str(where),
            mode=mode,
            settings=settings,
            config=config,
            metrics=str(metrics.absolute()),
            offset=offset,
            matrix_rate=matrix_rate,
        )
        return run

    def __init__(self, process: subprocess.Popen[bytes], where: Path) -> None:
        self._process, self._where = process, where

    def summarize(self, summary: dict[str, Any], pictures: Sequence[Path], evaluation: Path | None) -> None:
        """Hand over the final values, the plots, each an image under its file's name, and `evaluation.json`."""
        self._send(
            summary=summary,
            pictures=[str(picture.absolute()) for picture in pictures],
            evaluation=evaluation and str(evaluation.absolute()),
        )

    def artifact(self, path: Path) -> None:
        """Hand over a checkpoint."""
        self._send(artifact=str(path.absolute()))

    def close(self, exit_code: int) -> None:
        """End the run, and wait for that for `CLOSE_TIMEOUT` seconds at most."""
        self._send(exit_code=exit_code)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()  # wandb's own helper sees that, and ends too
            self._process.wait()
            _tell(f"W&B: stopped, it did not come to an end; what it has: {self._where}")

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended, and has said why
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._process.stdin.flush()


def main() -> None:
    """The process: begin the run, pass the record on until rank 0 says so or is gone, end the run."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # Slurm signals every process; rank 0 decides what follows
    messages = _messages()
    start = next(message for message in messages if message is not None)
    exit_code = 1  # unless rank 0 says another, it has died
    try:
        run = _begin(start)
        with Path(start["metrics"]).open("rb") as record:
            record.seek(start["offset"])
            for message in messages:
                _pass_on(record, run)
                if message and "summary" in message:
                    _summarize(run, message)
                if message and "exit_code" in message:
                    exit_code = message["exit_code"]
                    break
            _pass_on(record, run)
        run.finish(exit_code=exit_code)
    except TimeoutError:
        again = f"wandb sync --include-online {start['where']}/run-*"
        _tell(f"W&B: not all was uploaded in time; later: {again}")
    except Exception as error:
        _tell(f"W&B: stopped, {type(error).__name__}: {_line(error)}; training and its record go on")


def _messages() -> Iterator[Message | None]:
    """What rank 0 sends, None where it is silent for `POLL` seconds; ends when rank 0 is gone."""
    text, parent = b"", os.getppid()
    while os.getppid() == parent:  # a forked data loader may keep the pipe open
        if not select.select([sys.stdin], [], [], POLL)[0]:
            yield None
            continue
        received = os.read(sys.stdin.fileno(), 65536)
        if not received:
            return
        *lines, text = (text + received).split(b"\n")
        yield from map(json.loads, lines)


def _begin(start: Message) -> Any:
    import wandb

    where = Path(start["where"])
    known = {key: value for key, value in start["settings"].items() if key in wandb.Settings.model_fields}
    known["run_id"] = _run_id(where / "run_id")

    def begin(mode: str) -> Any:
        return wandb.init(config=start["config"], settings=wandb.Settings(**known, mode=mode))

    run = None
    if _online(start["mode"], wandb.setup().settings):
        try:
            run = begin("online")
            _tell(f"W&B: {run.url}")
        except Exception as error:
            _tell(f"W&B: no online run ({_line(error)}), going on offline")
            wandb.teardown()  # else the id counts as in use
    if run is None:
        run = begin("offline")
        _tell(f"W&B: offline run in {where}; upload it with: wandb sync {where}/offline-run-*")
    run.define_metric("step", hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/*", step_metric="step")
    run.define_metric("eval/*", step_metric="epoch")
    return run


def _online(mode: str, settings: Any) -> bool:
    if mode == "offline" or (mode == "auto" and settings.mode != "online"):
        return False
    if _logged_in(settings):
        return True
    if "online" in (mode, os.environ.get("WANDB_MODE")):  # wandb itself would ask for a key, and wait for it
        _tell(f"W&B: not logged in at {settings.base_url} (wandb login), so no online run")
    return False


def _logged_in(settings: Any) -> bool:
    """Whether wandb would find a key without asking for one."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def _run_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _pass_on(record: Any, run: Any) -> None:
    """Log the record's new lines. Their axes are their own `step` and `epoch`: a replay does no harm."""
    begin = record.tell()
    new = record.read()
    whole = new[: new.rfind(b"\n") + 1]
    record.seek(begin + len(whole))
    for row in map(json.loads, whole.splitlines()):
        if row["kind"] == "weights":  # nothing to draw
            continue
        train = row["kind"] == "step"
        prefix, axes = ("train", ("step",)) if train else ("eval", ("step", "epoch"))
        hidden = {"kind", "correct", "images", *axes}
        values = {f"{prefix}/{key}": row[key] for key in row if key not in hidden and row[key] is not None}
        run.log({**{axis: row[axis] for axis in axes}, **values})


def _summarize(run: Any, message: Message) -> None:
    import wandb

    pictures = [Path(picture) for picture in message["pictures"]]
    if pictures:
        run.log({f"plots/{picture.stem}": wandb.Image(str(picture)) for picture in pictures})
    run.summary.update(message["summary"])


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tell(sentence: str) -> None:
    wipe = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress bar comes back by itself
    print(f"{wipe}{sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
