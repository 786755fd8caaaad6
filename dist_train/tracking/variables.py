"""W&B's environment variables, which count where the configuration sets nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from dist_train.config.settings import RecordConfig
from dist_train.errors import UserError

PROJECT = "dist_train"  # where neither the configuration nor WANDB_PROJECT names one
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# what wandb.Settings refuses, with an error that names no setting
_NOT_IN_PROJECT, _NOT_IN_RUN_ID, _LONGEST, _LONGEST_TAG = "/\\#?%:", ":;,#?/'", 128, 64


def resolved(record: RecordConfig, option: str = "record.project") -> RecordConfig:
    """The settings of W&B, those that are not set taken from WANDB_MODE, WANDB_DISABLED, WANDB_PROJECT and WANDB_NAME.
    option: what the project was given with. Raises UserError for a setting or a variable, of those that count, that W&B
    does not accept."""
    mode = record.wandb if record.wandb != "auto" else _mode()
    record = replace(record, wandb=mode)  # type: ignore[arg-type]
    if mode == "disabled":
        return record
    where, project = (option, record.project) if record.project else ("WANDB_PROJECT", _given("WANDB_PROJECT"))
    if len(project) > _LONGEST or set(project) & set(_NOT_IN_PROJECT):
        raise UserError(
            f"{where} = {project}: a W&B project has at most {_LONGEST} characters, none of {_NOT_IN_PROJECT}; "
            f"choose another name"
        )
    for where, tags in (("record.tags", record.tags), ("WANDB_TAGS", _given("WANDB_TAGS").split(","))):
        if any(not 0 < len(tag) <= _LONGEST_TAG for tag in tags) and tags != [""]:
            raise UserError(f"{where} = {','.join(tags)}: a W&B tag has 1 to {_LONGEST_TAG} characters; change them")
    run_id = run_id_given()
    if len(run_id) > _LONGEST or set(run_id) & set(_NOT_IN_RUN_ID):
        raise UserError(
            f"WANDB_RUN_ID = {run_id}: has at most {_LONGEST} characters, none of {_NOT_IN_RUN_ID}; change it"
        )
    name = record.name or ("" if _in_array() else _given("WANDB_NAME"))
    return replace(record, project=project or PROJECT, name=name)


def run_id_given() -> str:
    """The id of the W&B run in WANDB_RUN_ID; empty where it is not set, and in an array, where all would share it."""
    return "" if _in_array() else _given("WANDB_RUN_ID")


def passed_on() -> Mapping[str, str]:
    """The environment for the W&B process: without variables that `resolved` took, empty ones, and those of a process
    that may end earlier."""
    taken = {"WANDB_SERVICE", "WANDB_MODE", "WANDB_DISABLED"}
    if not os.environ.get("WANDB_SWEEP_ID"):  # an agent's are read by wandb itself
        taken |= {"WANDB_PROJECT", "WANDB_NAME"}
    if _in_array():
        taken.add("WANDB_RUN_ID")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in taken and (value.strip() or not name.startswith("WANDB_"))
    }


def _mode() -> str:
    """The mode in WANDB_DISABLED or WANDB_MODE, `auto` where they are not set. Raises UserError."""
    disabled, mode = _given("WANDB_DISABLED").lower(), _given("WANDB_MODE").lower()
    if disabled not in ("", *_TRUE, *_FALSE):
        raise UserError(f"WANDB_DISABLED = {disabled}: set it to true or false, or unset it")
    if mode and mode not in _MODES:
        raise UserError(
            f"WANDB_MODE = {mode}: there is no such mode; set it to online, offline or disabled, or unset it"
        )
    return "disabled" if disabled in _TRUE else _MODES.get(mode, "auto")


def _in_array() -> bool:
    """Whether this process trains a member of an array of Slurm's, and not for a sweep's agent."""
    return "SLURM_ARRAY_TASK_ID" in os.environ and not os.environ.get("WANDB_SWEEP_ID")


def _given(name: str) -> str:
    return os.environ.get(name, "").strip()
