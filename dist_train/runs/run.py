"""The runs of a group: settings, summary, and what is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train import config
from dist_train.config.settings import Config
from dist_train.errors import UserError
from dist_train.runs.history import read_history
from dist_train.runs.layout import MEMBERS, SETTINGS, SUMMARY


@dataclass(frozen=True)
class Member:
    """A run of the group: its settings if it has begun, its summary if it is done, and otherwise why not."""

    folder: Path
    settings: Config | None
    summary: dict[str, Any] | None
    missing: str = ""

    @property
    def name(self) -> str:
        return self.folder.name


def members(group: Path) -> list[Member]:
    """The runs of a group by name, those that are expected but not there included. Raises UserError."""
    expected = json.loads((group / MEMBERS).read_text()) if (group / MEMBERS).exists() else {}
    begun = {path.parent.name for path in group.glob(f"*/{SETTINGS}")} if group.is_dir() else set()
    if not begun | expected.keys():
        raise UserError(f"{group}: holds no runs; name the folder above the run folders")
    # seed10 after seed9
    return [member(group / name) for name in sorted(begun | expected.keys(), key=lambda name: (len(name), name))]


def member(folder: Path) -> Member:
    """The run in a folder. Raises UserError where its settings cannot be read."""

    if not (folder / SETTINGS).exists():
        return Member(folder, None, None, "not begun")
    settings = config.load(None, folder / SETTINGS, [])
    if (folder / SUMMARY).exists():
        return Member(folder, settings, json.loads((folder / SUMMARY).read_text()))
    last = read_history(folder)[-1:]
    ended = bool(last) and last[0]["event"] == "end"
    return Member(folder, settings, None, f"{last[0]['outcome']} at step {last[0]['step']}" if ended else "not ended")
