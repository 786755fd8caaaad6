"""`history.jsonl`: when and where a run was started, how it ended, and its faults."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dist_train.errors import say
from dist_train.runs.contents import history_line
from dist_train.runs.layout import HISTORY
from dist_train.runs.metrics import Row, finite


def append_history(run_dir: Path, event: str, **fields: Any) -> None:
    """Add `{"event", "time", **fields}` to `history.jsonl`; `time` is UTC, in whole seconds. Rank 0 only.

    When the file cannot be written, this is reported on stderr and the run continues.
    """
    path = run_dir / HISTORY
    row = {"event": event, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **fields}
    line = (json.dumps(finite(row), default=str) + "\n").encode()
    try:
        with path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read() not in (b"", b"\n")  # a process was killed while it wrote the last line
            file.write(b"\n" * torn + line)
    except FileNotFoundError:
        return  # the folder was moved or deleted, which the metrics tell
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror}); the line on the {event} is skipped")


def read_history(run_dir: Path) -> list[Row]:
    """The valid lines of `history.jsonl`, none where there is no such file. Raises OSError."""
    path = run_dir / HISTORY
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for line in lines if (row := history_line(line)) is not None]
