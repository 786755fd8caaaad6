"""What all commands have in common: empty arguments are refused, and text is UTF-8 in every locale."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import recorded
from conftest import trainer
from PIL import Image

from dist_train import config
from dist_train.__main__ import main
from dist_train.commands import COMMANDS, plots, upload
from dist_train.config.arguments import parser
from dist_train.data_prep.__main__ import main as prepare
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


ASCII = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
OWN = """# Größe
[data]
dataset = "käfer"
image_size = 8
[record]
wandb = "disabled"
name = "Übung"
[train]
epochs = 1
batch_size = 16
microbatches = 2
precision = "fp32"
[[model.blocks]]
channels = 8
convolutions = [{}]
"""


def images(folder: Path, classes: list[str]) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / name / f"Bild {number} ß.png")
    return folder


def test_a_training_and_its_evaluation_in_a_locale_that_is_not_utf8(tmp_path: Path) -> None:
    source = images(tmp_path / "Größen", ["Käfer", "日本"])
    file, run_dir = tmp_path / "größe.toml", tmp_path / "Läufe"
    file.write_text(OWN, encoding="utf-8")
    settings = ["--config", file, f"data.source={source}", f"data.dir={tmp_path / 'Daten ß'}", "--run-dir", run_dir]
    done = trainer(*settings, variables=ASCII)
    assert done.returncode == 0, done.stderr
    assert "L\\xe4ufe" in done.stdout
    assert "Übung" in (run_dir / "config.toml").read_text(encoding="utf-8")
    assert config.load(None, run_dir / "config.toml", []).data.source == str(source)
    shown = trainer(run_dir, module="dist_train evaluate", variables=ASCII)
    assert shown.returncode == 0, shown.stderr
    assert "K\\xe4fer" in shown.stdout
    assert "\\u65e5\\u672c" in shown.stdout


def test_names_that_are_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"caf\xe9")
    source = images(tmp_path / "images", ["one", odd])
    own = ["--dataset", "mine", "--source", str(source), "--image-size", "8", "--out", str(tmp_path / "out")]
    assert prepare(own) == 2
    assert "the name of this class is not UTF-8: rename the folder" in capfd.readouterr().err
    assert prepare(["--dataset", odd]) == 2
    assert "--dataset: caf" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"--run-dir .* its path is not UTF-8"):
        config.check_folder(tmp_path / odd, config.load("digits", None, []))
    # a folder that was renamed after its training
    run_dir = tmp_path / odd
    recorded.whole_run(run_dir)
    assert plots.main([str(run_dir)]) == 0
    assert upload.main([str(run_dir)]) == 2
    assert "its path is not UTF-8" in capfd.readouterr().err
