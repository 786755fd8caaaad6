"""The run in Weights & Biases, as a reader of the record that training never waits for.

Everything that touches wandb, its import included, happens in one daemon thread that is fed through a
queue: wandb's own calls can block for good, `log` among them once its helper process hangs.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import signal
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

INIT_TIMEOUT = 5.0  # seconds for the server to answer before the run goes offline
FINISH_TIMEOUT = 15.0  # seconds for what is still to upload at the end
CLOSE_TIMEOUT = INIT_TIMEOUT + FINISH_TIMEOUT + 10.0  # seconds `close` waits at the very most
QUEUE_LIMIT = 50_000  # rows; only a hanging helper process lets so many pile up
# ERROR_REPORTING: else even an offline run calls home, and waits for it.
ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


class WandbRun:
    """One W&B run of the run folder; no method raises, none but `close` waits."""

    @classmethod
    def start(cls, run_dir: Path, *, mode: str, **options: Any) -> WandbRun | None:
        """Begin the run, or return None when the environment says WANDB_MODE=disabled and mode is auto.

        Args:
            run_dir: files go to `run_dir/wandb`, with the run's id: a restart or a move continues it.
            mode: auto (WANDB_MODE if set, else online when logged in, else offline), online or offline.
            options: project, group, name, tags, config, and tell (called with each line for the user).
        """
        if mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            return None
        return cls(run_dir, mode=mode, **options)

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: str,
        project: str,
        group: str,
        name: str,
        tags: Sequence[str],
        config: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._dir, self._mode, self._tell, self._config = run_dir.absolute(), mode, tell, config
        self._options = {
            "project": project,
            "run_name": name,
            **({"run_group": group} if group else {}),  # unset, the environment's count
            **({"run_tags": tuple(tags)} if tags else {}),
        }
        self._silent = False
        self._where = self._dir / "wandb"
        self._exit_code = 0
        self._jobs: queue.Queue[Callable[[Any], None] | None] = queue.Queue(QUEUE_LIMIT)
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Hand over one row; its axis is its own `step` or `epoch`, so a replayed row does no harm."""
        self._put(lambda run: run.log(row))

    def summarize(self, summary: dict[str, Any], pictures: Sequence[Path]) -> None:
        """Hand over the final values and the plots, one image per file under the file's name."""

        def job(run: Any) -> None:
            import wandb

            if pictures:
                run.log({f"plots/{picture.stem}": wandb.Image(str(picture)) for picture in pictures})
            run.summary.update(summary)

        self._put(job)

    def close(self, exit_code: int) -> None:
        """End the run, and wait for it for `CLOSE_TIMEOUT` seconds at most."""
        self._exit_code = exit_code
        self._put(None)
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            self._give_up("it did not come to an end")
            _kill_helper()  # else the interpreter's exit waits for it, for good
            self._thread.join(1.0)

    def _put(self, job: Callable[[Any], None] | None) -> None:
        if self._silent:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._give_up("it does not take rows any more")

    def _give_up(self, reason: str) -> None:
        if not self._silent:
            self._silent = True
            self._tell(f"W&B: stopped, {reason}; the run folder's record goes on. Its part: {self._where}")

    def _serve(self) -> None:
        try:
            run = self._init()
            while (job := self._jobs.get()) is not None:
                job(run)
            run.finish(exit_code=self._exit_code)
        except TimeoutError:
            self._silent = True
            self._tell(
                f"W&B: not all was uploaded in time; later: wandb sync --include-online {self._where}/run-*"
            )
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {_first_line(error)}")
        finally:
            _teardown()

    def _init(self) -> Any:
        import wandb

        wanted = {
            **self._options,
            "run_id": self._run_id(),
            "resume": "allow",
            "root_dir": str(self._dir),
            "console": "off",
            "silent": True,
            "init_timeout": INIT_TIMEOUT,
            "finish_timeout": FINISH_TIMEOUT,
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 1.0,  # a killed run loses a second, not fifteen
        }
        known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}

        def begin(mode: str) -> Any:
            # resume= never with step=: W&B drops the rows of a replayed step.
            settings = wandb.Settings(**known, mode=mode)
            return wandb.init(config=self._config, settings=settings)

        run = None
        if self._online(wandb.setup().settings):
            try:
                run = begin("online")
                self._tell(f"W&B: {run.url}")
            except Exception as error:
                self._tell(f"W&B: no online run ({_first_line(error)}), going on offline")
                _teardown()  # else the id counts as in use
        if run is None:
            run = begin("offline")
            self._tell(
                f"W&B: offline run in {self._where}; upload it with: wandb sync {self._where}/offline-run-*"
            )
        run.define_metric("step", hidden=True)
        run.define_metric("epoch", hidden=True)
        run.define_metric("train/*", step_metric="step")
        run.define_metric("eval/*", step_metric="epoch")
        return run

    def _online(self, settings: Any) -> bool:
        if self._mode == "offline" or (self._mode == "auto" and settings.mode != "online"):
            return False
        if _logged_in(settings):
            return True
        if "online" in (
            self._mode,
            os.environ.get("WANDB_MODE"),
        ):  # wandb would ask for a key, and wait for it
            self._tell(f"W&B: not logged in at {settings.base_url} (wandb login), so no online run")
        return False

    def _run_id(self) -> str:
        path = self._where / "run_id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12])
        return path.read_text().strip()


def _logged_in(settings: Any) -> bool:
    """Whether wandb would find a key without asking for one; host and key file also from its settings."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def _teardown() -> None:
    """Stop wandb's helper process, which the interpreter's exit would otherwise wait for."""
    try:
        import wandb

        wandb.teardown()
    except Exception:  # it is gone already
        return


def _kill_helper() -> None:
    """Kill this process's wandb-core child (on Linux; elsewhere there is no /proc to find it in)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that has just ended
            pid, _, rest = stat.read_text().partition(" (")
            name, _, fields = rest.rpartition(") ")
            if name == "wandb-core" and int(fields.split()[1]) == os.getpid():
                os.kill(int(pid), signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
