"""What all commands have in common: empty arguments are refused."""

from __future__ import annotations

from importlib import import_module

import pytest

from dist_train import config
from dist_train.__main__ import main
from dist_train.commands import COMMANDS
from dist_train.config.arguments import parser
from dist_train.errors import UserError


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
@pytest.mark.parametrize("arguments", [[""], [" "], ["--out", ""], ["--out="], ["RUN", "", "RUN"]])
def test_empty_arguments_are_refused(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert import_module(COMMANDS[name].module).main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "empty" in shown.err


@pytest.mark.parametrize("arguments", [[""], ["--run-dir", ""], ["--preset="], ["seed=1", "", "--quiet"]])
def test_the_trainer_refuses_empty_arguments(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="empty"):
        parser().parse_intermixed_args(arguments)


def test_empty_settings_are_refused_unless_quoted() -> None:
    for setting in ("data.dir=", "data.dir= ", "record.name="):
        with pytest.raises(UserError, match="an empty value; give one"):
            config.load("digits", None, [setting])
    assert config.load("digits", None, ['data.dir=""']).data.dir == ""


def test_an_empty_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([""]) == 2
    assert capsys.readouterr().err.startswith("dist_train: '': there is no such command")
