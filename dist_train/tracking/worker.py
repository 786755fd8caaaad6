"""The W&B process of a run, beside rank 0: reads the run folder's metrics and logs them to W&B.

A separate process, because wandb's calls can block forever (`log` too, once wandb's service process hangs), and
because a row takes a third of a millisecond of Python, which rank 0 needs to launch its kernels. Rank 0 only sends
messages: where the run folder is, which checkpoints to keep, the summary, and the end. If rank 0 dies, this process
finishes the W&B run as failed.

W&B gets `train/*` against `step`; `eval/*` and, of each convolution's mixing coefficient over the test images,
`mixing/block1/conv2_1x1_mean` and `_std` against `epoch`; where all ranks sample themselves `ranks/cpu_percent/rank0`
and so on against `elapsed_seconds`; at the end `plots/*` and `evaluation/*`. The axes are logged as metrics, so that a
row which is logged twice, after a restart, is the same point in a chart.
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
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dist_train.command_line import use_utf8
from dist_train.errors import PREEMPTED, first_line, show
from dist_train.files import write_atomic
from dist_train.runs.layout import METRICS, SAMPLES, WANDB, samples_path, step_of
from dist_train.runs.metrics import Row
from dist_train.tracking.messages import Artifact, Begin, End, Message, Summary, decode, shared
from dist_train.tracking.variables import run_id_given

POLL = 0.5  # seconds between two reads of the metrics
_ROWS_SHOWN = 10_000  # the most rows of a table that W&B's page shows


def main() -> int:
    """Start the W&B run that the first message describes, log its metrics until a message ends it or rank 0 dies, and
    finish it.

    Prints the run's address or folder. Returns the exit code: 0, or 1 when the run was not finished, or is offline
    although `record.wandb` is online; the reason is on stderr.
    """
    use_utf8()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # Slurm signals every process, but rank 0 ends this one
    messages = _messages()
    first = next(message for message in messages if message is not None)
    assert isinstance(first, Begin)
    received: list[Message] = []
    folder = Path(first.run_dir, WANDB)
    for attempt in (1, 2):
        try:
            run, location = _follow(first, received, messages)
            show(location)
            return int(first.mode == "online" and run.offline)
        except TimeoutError:
            runs = f"{shlex.quote(str(folder))}/run-*"
            _report(f"W&B: not all was uploaded in time; later: wandb sync --include-online {runs}")
            break
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            if attempt == 2:
                _report(f"W&B: stopped, {reason}; training continues, with its metrics in the run folder")
            else:  # a stop signal ends wandb's service process, which does not ignore it, with unwritten rows
                _report(f"W&B: restarted after {reason}")
                _tear_down()
                time.sleep(1.0)  # wandb's folders are named by the second
    return 1


def _follow(first: Begin, received: list[Message], messages: Iterator[Message | None]) -> tuple[Any, str]:
    """Start the run, log its metrics, handle the messages, and finish it. Returns the run and its address or folder.

    received: earlier messages after the first, of an attempt that failed; they are handled first, and new ones are
    appended.
    """
    exit_code = 1  # of a rank 0 that dies without an End message
    run, location, new = _begin(first)
    below = _table_begun(first)  # a line between its rows would split it
    if not below:
        _report(_where(run, first))
    reader = _RunFolderReader(replace(first, sent={}) if new else first)
    for message in itertools.chain([*received], _appending(messages, received)):
        reader.log_new_rows(run)
        if isinstance(message, Artifact):
            _log_checkpoint(run, Path(message.path))
        elif isinstance(message, Summary):
            _summarize(run, message, first.share)
        elif isinstance(message, End):
            exit_code = message.exit_code
            break
    reader.log_new_rows(run)
    if below:
        _report(_where(run, first))
    if exit_code == PREEMPTED:
        run.mark_preempting()  # W&B would otherwise show it as failed
    run.finish(exit_code=exit_code)
    return run, location


def _appending(messages: Iterator[Message | None], received: list[Message]) -> Iterator[Message | None]:
    """The messages, each of which is also appended to `received`."""
    for message in messages:
        if message is not None:
            received.append(message)
        yield message


def _messages() -> Iterator[Message | None]:
    """Messages of rank 0, None after each `POLL` seconds without one; ends when rank 0 has ended."""
    text, parent = b"", os.getppid()
    while os.getppid() == parent:  # a forked data loader may keep the pipe open
        if not select.select([sys.stdin], [], [], POLL)[0]:
            yield None
            continue
        data = os.read(sys.stdin.fileno(), 65536)
        if not data:
            return
        *lines, text = (text + data).split(b"\n")
        yield from map(decode, lines)


def _begin(first: Begin) -> tuple[Any, str, bool]:
    """Start the run. Returns it, its address or folder, and whether it is new, so that all rows are to be logged."""
    import wandb
    from wandb.sdk import wandb_setup  # wandb.setup would start the service process, and wait forever if that dies

    folder = Path(first.run_dir, WANDB)
    known = {key: value for key, value in first.settings.items() if key in wandb.Settings.model_fields}
    new = "run_id" in known
    if not new:
        known["run_id"], new = _run_id(folder / "run_id")

    def begin(mode: str) -> Any:
        return wandb.init(config=first.config, settings=wandb.Settings(**known, mode=mode))

    if _online(first.mode, wandb_setup.singleton().settings):
        try:
            run = begin("online")
            return _with_axes(run), str(run.url), new
        except wandb.errors.Error as error:
            _report(f"W&B: no online run ({first_line(error)}), continuing offline")
            _tear_down()  # otherwise wandb reports the id as in use
    run = begin("offline")
    return _with_axes(run), str(run.settings.sync_dir), new


def _where(run: Any, first: Begin) -> str:
    """The sentence on where the run is."""
    if not run.offline:
        return f"W&B: {run.url}"
    folder = Path(first.run_dir, WANDB)
    return f"W&B: offline run in {folder}; upload it with: wandb sync {shlex.quote(str(folder))}/offline-run-*"


def _table_begun(first: Begin) -> bool:
    """Whether the terminal shows a part of the table of this training, which has a row for each evaluation."""
    if not first.table:
        return False
    with Path(first.run_dir, METRICS).open("rb") as file:
        file.seek(first.sent[METRICS])
        return any(line.startswith(b'{"kind": "eval"') for line in file)


def _report(sentence: str) -> None:
    show(sentence, stream=sys.stderr)


def _tear_down() -> None:
    """End wandb's service process, if it is alive."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _with_axes(run: Any) -> Any:
    """The run, with the horizontal axis of each kind of metrics defined."""
    for axis in ("step", "epoch", "elapsed_seconds"):
        run.define_metric(axis, hidden=True)
    for kind, axis in (("train", "step"), ("eval", "epoch"), ("mixing", "epoch"), ("ranks", "elapsed_seconds")):
        run.define_metric(f"{kind}/*", step_metric=axis)
    return run


def _online(mode: str, settings: Any) -> bool:
    """Whether to start an online run. mode: of RecordConfig. settings: wandb's. A missing login is reported."""
    if mode == "offline" or (mode == "auto" and settings.mode != "online"):
        return False
    if logged_in(settings):
        return True
    if mode == "online":  # wandb.init would prompt for a key and wait
        _report(f"W&B: not logged in at {settings.base_url} (wandb login), so no online run")
    return False


def logged_in(settings: Any) -> bool:
    """Whether wandb has an API key or a token, so that it does not prompt for one. settings: wandb's."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(settings.base_url).netloc) is not None


def _run_id(path: Path) -> tuple[str, bool]:
    """The W&B run's id, and whether it is new. path: of the file in the run folder that stores the id."""
    stored = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    given = run_id_given()
    # a sweep's agent chooses the id, and waits for the run that has it; other runs are resumed under their own
    agents = given if os.environ.get("WANDB_SWEEP_ID") else ""
    run_id = agents or stored or given or uuid.uuid4().hex[:12]
    if run_id != stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, run_id.encode())
    return run_id, run_id != stored


class _RunFolderReader:
    """Reads new lines of the metrics and samples in a run folder, and logs them as rows."""

    def __init__(self, first: Begin) -> None:
        self._dir, self._first, self._offsets = Path(first.run_dir), first, dict(first.sent)
        self._start: float | None = None  # Unix time of rank 0's first sample, in seconds

    def log_new_rows(self, run: Any) -> None:
        """Log all new complete lines."""
        for line in self._new_lines(METRICS):
            row = json.loads(line)
            if row["kind"] == "step":
                run.log(_step_row(row, self._first.matrix_rate))
            elif row["kind"] == "eval":  # digests of the weights are not logged
                run.log(_eval_row(row, self._first.branches))
        self._start = self._start or (self._first_sample() if self._first.samples else None)
        if self._start is None:
            return
        for path in sorted(self._dir.glob(SAMPLES)):
            for line in self._new_lines(str(path.relative_to(self._dir))):
                with contextlib.suppress(ValueError):  # a kill may leave a torn line, joined to the next one
                    run.log(_sample_row(json.loads(line), path.stem.replace("-", ""), self._start))

    def _first_sample(self) -> float | None:
        """Unix time of rank 0's first sample in seconds, None where there is none."""
        with contextlib.suppress(FileNotFoundError), samples_path(self._dir, 0).open(encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    return float(json.loads(line)["time"])
        return None

    def _new_lines(self, name: str) -> list[bytes]:
        """The complete lines of a file since the last call."""
        with (self._dir / name).open("rb") as file:  # opening makes a network file system look for new data
            file.seek(self._offsets.get(name, 0))
            new = file.read()
        end = new.rfind(b"\n") + 1
        self._offsets[name] = self._offsets.get(name, 0) + end
        return new[:end].splitlines()


def _sample_row(row: Row, rank: str, start: float) -> Row:
    """W&B's row for a line of system/rank-N.jsonl. rank: such as `rank0`. start: Unix time of the first one."""
    values = {f"ranks/{key}/{rank}": value for key, value in row.items() if key not in ("time", "host")}
    return {"elapsed_seconds": row["time"] - start, **values}


def _step_row(row: Row, matrix_rate: float) -> Row:
    """W&B's row for a step line of metrics.jsonl. matrix_rate: FLOP/s, NaN for no MFU."""
    values = {key: row[key] for key in ("epoch", "loss", "lr", "grad_norm", "images_per_second")}
    values["accuracy"] = row["correct"] / row["images"]
    if math.isfinite(matrix_rate):
        values["mfu"] = row["flops"] / row["images"] * row["images_per_second"] / matrix_rate
    return _without_none({"step": row["step"], **{f"train/{key}": value for key, value in values.items()}})


def _eval_row(row: Row, branches: list[list[str]]) -> Row:
    """W&B's row for an eval line of metrics.jsonl. branches: for each block the names of its convolutions."""
    not_metrics = ("kind", "step", "epoch", "coefficients")
    values = {f"eval/{key}": value for key, value in row.items() if key not in not_metrics}
    for block, (names, statistics) in enumerate(zip(branches, row["coefficients"], strict=False), 1):
        for name, (mean, std) in zip(_keys(names), statistics, strict=True):
            values |= {f"mixing/block{block}/{name}_mean": mean, f"mixing/block{block}/{name}_std": std}
    return _without_none({"step": row["step"], "epoch": row["epoch"], **values})


def _keys(names: Sequence[str]) -> list[str]:
    """The convolutions of a block as parts of W&B's keys, without spaces: `conv1_3x3`, `conv2_3x3_d2`."""
    return [f"conv{position}_{name.replace(' ', '_')}" for position, name in enumerate(names, 1)]


def _without_none(row: Row) -> Row:
    """The row without null, which stands in metrics.jsonl for a number that is not finite."""
    return {key: value for key, value in row.items() if value is not None}


def _log_checkpoint(run: Any, checkpoint: Path) -> None:
    """Make a checkpoint a version of the run's artifact; afterwards its file may be changed or removed."""
    import wandb

    step = step_of(checkpoint)
    artifact = wandb.Artifact(f"checkpoint-{run.id}", "model", metadata={"step": step})
    try:
        artifact.add_file(str(checkpoint), skip_cache=True)
    except (OSError, ValueError):
        _report(f"W&B: {checkpoint} no longer exists, and is not among the run's artifacts")
    else:
        run.log_artifact(artifact, aliases=["latest", f"step-{step}"])


def _summarize(run: Any, message: Summary, share: str) -> None:
    """Log the plots, the last evaluation and the summary. share: `record.share`."""
    import wandb

    row = {f"plots/{Path(plot).stem}": wandb.Image(plot) for plot in message.plots}
    if message.evaluation:
        details = json.loads(Path(message.evaluation).read_text(encoding="utf-8"))
        kept = () if share == "all" else ("wrong",)  # its rows are test images
        row |= {f"evaluation/{name}": value for name, value in _details(details).items() if name not in kept}
        run.summary[f"{details['split']}_ece"] = details["calibration"]["ece"]
    if row:
        run.log(row)
    run.summary.update(shared(message.summary, share))


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
    if len(counts) > _ROWS_SHOWN:
        counts = [row for row in counts if row[2]]  # at most one for each image; what is missing is 0
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
    names = [f"block{n}/{name}" for n, block in enumerate(blocks, 1) for name in _keys(block["branches"])]
    by_class = [
        [name, *(value for block in blocks for value in block["by_class"][number])]
        for number, name in enumerate(classes)
    ]
    # wandb would cut longer tables, silently
    longest = max(wandb.Table.MAX_ROWS, len(counts), len(by_class))
    wandb.Table.MAX_ROWS, wandb.Table.MAX_ARTIFACT_ROWS = longest, max(wandb.Table.MAX_ARTIFACT_ROWS, longest)
    return {
        # the chart of wandb.plot.confusion_matrix, made from the counts
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
