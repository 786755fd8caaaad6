"""The run in Weights & Biases: a process beside rank 0 that reads the record and passes it on.

A process of its own, because wandb's calls can block for good (`log` too, once wandb's helper hangs), and
because a row costs a third of a millisecond of Python, which rank 0 needs to launch its kernels. Rank 0 only
tells it where the record is, which checkpoints to keep, the summary, and the end. If rank 0 dies, it brings the run
to its end.

W&B gets `train/*` against `step`; `eval/*` and, of each convolution's mixing coefficient over the test images,
`mixing/block1/conv2_1x1_mean` and `_std` against `epoch`; where all ranks sample themselves `ranks/cpu_percent/rank0`
and so on against `elapsed_seconds`; at the end `plots/*` and `evaluation/*`. The axes are values of their own, so
that rows which come twice, after a restart, lie on each other.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import math
import netrc
import os
import select
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_train.errors import PREEMPTED
from dist_train.runs.layout import METRICS, SAMPLES, WANDB, samples_path, step_of
from dist_train.runs.metrics import Row
from dist_train.tracking.client import first_line, tell
from dist_train.tracking.messages import Artifact, Begin, End, Message, Summary, decode

POLL = 0.5  # seconds between two looks at the record


def main() -> int:
    """The process: begin the run that the first message describes, pass its record on until a message says that it is
    over or rank 0 is gone, and end it.

    Prints where the run is. Returns 0; 1 when it did not come to its end, or not online as it was to, and says so.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # Slurm signals every process; rank 0 decides what follows
    messages = _messages()
    first = next(message for message in messages if message is not None)
    assert isinstance(first, Begin)
    received: list[Message] = []
    where = Path(first.run_dir, WANDB)
    for attempt in (1, 2):
        try:
            run, place = _follow(first, received, messages)
            print(place)
            return int(first.mode == "online" and run.offline)
        except TimeoutError:
            tell(f"W&B: not all was uploaded in time; later: wandb sync --include-online {where}/run-*")
            break
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            if attempt == 2:
                tell(f"W&B: stopped, {reason}; training and its record go on")
            else:  # wandb's helper heeds the signals that are ignored here, and takes what it has not written with it
                tell(f"W&B: begun again after {reason}")
                _tear_down()
                time.sleep(1.0)  # wandb's folders are named by the second
    return 1


def _follow(first: Begin, received: list[Message], messages: Iterator[Message | None]) -> tuple[Any, str]:
    """Begin the run, pass on its metrics and the messages, end it. Returns it and where it is.

    received: the messages after the first so far, which are passed on first; new ones are added to it.
    """
    exit_code = 1  # unless rank 0 sends another, it has died
    run, place, new = _begin(first)
    record = _Record(replace(first, seen={}) if new else first)
    for message in itertools.chain([*received], _kept(messages, received)):
        record.pass_on(run)
        if isinstance(message, Artifact):
            _keep(run, Path(message.path))
        elif isinstance(message, Summary):
            _summarize(run, message)
        elif isinstance(message, End):
            exit_code = message.exit_code
            break
    record.pass_on(run)
    if exit_code == PREEMPTED:
        run.mark_preempting()  # it is then shown as preempted, not as failed
    run.finish(exit_code=exit_code)
    return run, place


def _kept(messages: Iterator[Message | None], received: list[Message]) -> Iterator[Message | None]:
    for message in messages:
        if message is not None:
            received.append(message)
        yield message


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
        yield from map(decode, lines)


def _begin(first: Begin) -> tuple[Any, str, bool]:
    """The run, where it is, and whether it is a new one, which has had nothing of the record."""
    import wandb
    from wandb.sdk import wandb_setup  # wandb.setup would start the helper, and wait for good if that dies

    where = Path(first.run_dir, WANDB)
    known = {key: value for key, value in first.settings.items() if key in wandb.Settings.model_fields}
    new = "run_id" in known
    if not new:
        known["run_id"], new = _run_id(where / "run_id")

    def begin(mode: str) -> Any:
        return wandb.init(config=first.config, settings=wandb.Settings(**known, mode=mode))

    if _online(first.mode, wandb_setup.singleton().settings):
        try:
            run = begin("online")
            tell(f"W&B: {run.url}")
            return _with_axes(run), str(run.url), new
        except wandb.errors.Error as error:
            tell(f"W&B: no online run ({first_line(error)}), going on offline")
            _tear_down()  # else the id counts as in use
    run = begin("offline")
    tell(f"W&B: offline run in {where}; upload it with: wandb sync {where}/offline-run-*")
    return _with_axes(run), str(run.settings.sync_dir), new


def _tear_down() -> None:
    """End wandb's helper, if it is still there."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _with_axes(run: Any) -> Any:
    for axis in ("step", "epoch", "elapsed_seconds"):
        run.define_metric(axis, hidden=True)
    for kind, axis in (("train", "step"), ("eval", "epoch"), ("mixing", "epoch"), ("ranks", "elapsed_seconds")):
        run.define_metric(f"{kind}/*", step_metric=axis)
    return run


def _online(mode: str, settings: Any) -> bool:
    if mode == "offline" or (mode == "auto" and settings.mode != "online"):
        return False
    if logged_in(settings):
        return True
    if "online" in (mode, os.environ.get("WANDB_MODE")):  # wandb itself would ask for a key, and wait for it
        tell(f"W&B: not logged in at {settings.base_url} (wandb login), so no online run")
    return False


def logged_in(settings: Any) -> bool:
    """Whether wandb would find a key without asking for one."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def _run_id(path: Path) -> tuple[str, bool]:
    """The run's id, which the run folder keeps, and whether it is a new one there."""
    kept = path.read_text().strip() if path.exists() else ""
    # a sweep's agent chooses it, and waits for this run
    agents = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
    found = agents or kept or uuid.uuid4().hex[:12]
    if found != kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    return found, found != kept


class _Record:
    """What is new in a run folder, as rows."""

    def __init__(self, first: Begin) -> None:
        self._dir, self._first, self._seen = Path(first.run_dir), first, dict(first.seen)
        self._began: float | None = None  # the time of rank 0's first sample

    def pass_on(self, run: Any) -> None:
        """Log all new lines that are whole."""
        for line in self._new_lines(METRICS):
            row = json.loads(line)
            if row["kind"] == "step":
                run.log(_step_row(row, self._first.matrix_rate))
            elif row["kind"] == "eval":  # digests of the weights are nothing to draw
                run.log(_eval_row(row, self._first.branches))
        self._began = self._began or (self._first_sample() if self._first.samples else None)
        if self._began is None:
            return
        for path in sorted(self._dir.glob(SAMPLES)):
            for line in self._new_lines(str(path.relative_to(self._dir))):
                with contextlib.suppress(ValueError):  # torn by a kill, and the next start's first line behind it
                    run.log(_sample_row(json.loads(line), path.stem.replace("-", ""), self._began))

    def _first_sample(self) -> float | None:
        with contextlib.suppress(FileNotFoundError), samples_path(self._dir, 0).open() as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    return float(json.loads(line)["time"])
        return None

    def _new_lines(self, name: str) -> list[bytes]:
        with (self._dir / name).open("rb") as file:  # opened anew: a network file system then asks for what is new
            file.seek(self._seen.get(name, 0))
            new = file.read()
        end = new.rfind(b"\n") + 1
        self._seen[name] = self._seen.get(name, 0) + end
        return new[:end].splitlines()


def _sample_row(row: Row, rank: str, began: float) -> Row:
    values = {f"ranks/{key}/{rank}": value for key, value in row.items() if key not in ("time", "host")}
    return {"elapsed_seconds": row["time"] - began, **values}


def _step_row(row: Row, matrix_rate: float) -> Row:
    values = {key: row[key] for key in ("epoch", "loss", "lr", "grad_norm", "images_per_second")}
    values["accuracy"] = row["correct"] / row["images"]
    if math.isfinite(matrix_rate):
        values["mfu"] = row["flops"] / row["images"] * row["images_per_second"] / matrix_rate
    return _without_none({"step": row["step"], **{f"train/{key}": value for key, value in values.items()}})


def _eval_row(row: Row, branches: list[list[str]]) -> Row:
    others = ("kind", "step", "epoch", "coefficients")
    values = {f"eval/{key}": value for key, value in row.items() if key not in others}
    for block, (names, found) in enumerate(zip(branches, row["coefficients"], strict=False), 1):
        for name, (mean, std) in zip(_in_order(names), found, strict=True):
            values |= {f"mixing/block{block}/{name}_mean": mean, f"mixing/block{block}/{name}_std": std}
    return _without_none({"step": row["step"], "epoch": row["epoch"], **values})


def _in_order(names: Sequence[str]) -> list[str]:
    """A block's convolutions as W&B takes them in keys, without spaces: `conv1_3x3`, `conv2_3x3_d2`."""
    return [f"conv{position}_{name.replace(' ', '_')}" for position, name in enumerate(names, 1)]


def _without_none(row: Row) -> Row:
    return {key: value for key, value in row.items() if value is not None}  # was not finite


def _keep(run: Any, checkpoint: Path) -> None:
    """Make a checkpoint a version of the run's artifact; its file may change or go from then on."""
    import wandb

    step = step_of(checkpoint)
    artifact = wandb.Artifact(f"checkpoint-{run.id}", "model", metadata={"step": step})
    try:
        artifact.add_file(str(checkpoint), skip_cache=True)
    except (OSError, ValueError):
        tell(f"W&B: {checkpoint} is gone already, and not among the run's artifacts")
    else:
        run.log_artifact(artifact, aliases=["latest", f"step-{step}"])


def _summarize(run: Any, message: Summary) -> None:
    import wandb

    pictures = [Path(picture) for picture in message.pictures]
    row = {f"plots/{picture.stem}": wandb.Image(str(picture)) for picture in pictures}
    if message.evaluation:
        details = json.loads(Path(message.evaluation).read_text())
        row |= {f"evaluation/{name}": value for name, value in _details(details).items()}
        run.summary[f"{details['split']}_ece"] = details["calibration"]["ece"]
    if row:
        run.log(row)
    run.summary.update(message.summary)


def _details(details: Row) -> dict[str, Any]:
    """Charts and tables of an `evaluation.json`."""
    import wandb
    from PIL import Image

    classes, blocks = details["classes"], details["coefficients"]
    counts = [
        [actual, predicted, count]
        for actual, row in zip(classes, details["confusion"], strict=True)
        for predicted, count in zip(classes, row, strict=True)
    ]
    bins = [[b["confidence"], b["accuracy"], b["count"]] for b in details["calibration"]["bins"] if b["count"]]
    wrong = [
        [
            wandb.Image(Image.open(io.BytesIO(base64.b64decode(image["png"])))),
            classes[image["label"]],
            classes[image["predicted"]],
            image["confidence"],
            image["index"],
        ]
        for image in details["wrong"]
    ]
    names = [f"block{n}/{name}" for n, block in enumerate(blocks, 1) for name in _in_order(block["branches"])]
    by_class = [
        [name, *(value for block in blocks for value in block["by_class"][number])]
        for number, name in enumerate(classes)
    ]
    return {
        # W&B's own chart, from the counts
        "confusion_matrix": wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=counts),
            {axis: axis for axis in ("Actual", "Predicted", "nPredictions")},
            {"title": f"Confusion matrix ({details['split']}, {details['images']:,} images)"},
        ),
        "calibration": wandb.plot.line(
            wandb.Table(columns=["confidence", "accuracy", "images"], data=bins),
            "confidence",
            "accuracy",
            title=f"Calibration ({details['split']}, ECE {100 * details['calibration']['ece']:.2f} %)",
        ),
        "wrong": wandb.Table(columns=["image", "label", "predicted", "confidence", "index"], data=wrong),
        "coefficients_by_class": wandb.Table(columns=["class", *names], data=by_class),
    }


if __name__ == "__main__":
    sys.exit(main())
