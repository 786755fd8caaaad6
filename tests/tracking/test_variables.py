"""W&B's environment variables: they count where the configuration sets nothing, and are checked before a training."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import trainer

from dist_train.commands import dashboard
from dist_train.config.settings import RecordConfig
from dist_train.errors import UserError
from dist_train.tracking.variables import passed_on, resolved, run_id_given

ONLINE = RecordConfig(wandb="online")


@pytest.fixture(autouse=True)
def none_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith(("WANDB_", "SLURM_"))]:
        monkeypatch.delenv(key)


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "auto"),
        ({"WANDB_MODE": ""}, "auto"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "online"}, "online"),
        ({"WANDB_DISABLED": ""}, "auto"),
    ],
)
def test_modes(variables: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert resolved(RecordConfig()).wandb == mode
    assert resolved(RecordConfig(wandb="offline")).wandb == "offline"


def test_settings_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(ONLINE).project == "dist_train"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "a name")
    taken = resolved(ONLINE)
    assert (taken.project, taken.name) == ("mine", "a name")
    taken = resolved(RecordConfig(wandb="online", project="set", name="set too"))
    assert (taken.project, taken.name) == ("set", "set too")


def test_members_of_an_array_share_neither_name_nor_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_NAME", "a name")
    monkeypatch.setenv("WANDB_RUN_ID", "an-id")
    assert (resolved(ONLINE).name, run_id_given(), passed_on()["WANDB_RUN_ID"]) == ("a name", "an-id", "an-id")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert (resolved(ONLINE).name, run_id_given()) == ("", "")
    assert not {"WANDB_NAME", "WANDB_RUN_ID"} & passed_on().keys()
    monkeypatch.setenv("WANDB_SWEEP_ID", "a-sweep")  # an agent in a job of an array: the id is its member's
    assert run_id_given() == "an-id"


@pytest.mark.parametrize(
    ("record", "variables", "words"),
    [
        (ONLINE, {"WANDB_PROJECT": "team/mine"}, "WANDB_PROJECT = team/mine: a W&B project has at most 128"),
        (RecordConfig(project="50%"), {"WANDB_PROJECT": "mine"}, "record.project = 50%: a W&B project"),
        (RecordConfig(project="x" * 129), {}, "record.project = xxx"),
        (RecordConfig(tags=["ok", ""]), {}, "record.tags = ok,: a W&B tag has 1 to 64"),
        (ONLINE, {"WANDB_TAGS": "x" * 65}, "WANDB_TAGS = xxx"),
        (ONLINE, {"WANDB_RUN_ID": "a/b"}, "WANDB_RUN_ID = a/b: "),
        (RecordConfig(), {"WANDB_MODE": "offlin"}, "WANDB_MODE = offlin: there is no such mode"),
        (RecordConfig(), {"WANDB_MODE": "shared"}, "WANDB_MODE = shared: there is no such mode"),
        (RecordConfig(), {"WANDB_DISABLED": "maybe"}, "WANDB_DISABLED = maybe: set it to true or false"),
    ],
)
def test_what_wandb_refuses(
    record: RecordConfig, variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(words)):
        resolved(record)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert resolved(RecordConfig(wandb="disabled", project="a/b")).wandb == "disabled"  # whatever the rest


def test_commands_refuse_it_before_any_work(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", "--run-dir", tmp_path / "run"]
    done = trainer(*arguments, variables={"WANDB_PROJECT": "a/b"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "dist_train: WANDB_PROJECT = a/b: a W&B project" in done.stderr
    assert not (tmp_path / "run").exists()
    assert dashboard.main(["--project", "a/b", "--json"]) == 2
    assert "--project = a/b: a W&B project" in capsys.readouterr().err
