"""Files, folders and outputs that cannot be used: one sentence from every command, and no end of a training."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, SUMMARY, TINY, environment, lines
from recorded import opened, train

from dist_train import config
from dist_train import main as trainer
from dist_train.__main__ import main
from dist_train.errors import BAD_INPUT
from dist_train.runs import layout

LONG = "x" * 300
COMMANDS = [
    *("plots BAD", "table BAD", "report BAD", "report RUN --out BAD", "diff RUN BAD", "diff BAD RUN"),
    *("describe BAD", "describe digits --picture BAD/a.svg", "upload BAD --offline", "predict BAD a.png"),
    *("export BAD", "train --preset digits --run-dir BAD", "train --preset digits data.dir=BAD"),
    *("prepare --dataset digits --out BAD", "prepare --dataset mine --image-size 8 --source BAD --out OUT"),
    *("prepare --verify --out BAD", "submit --local --preset digits --run-dir BAD", "submit --local --sweep BAD"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run folder, without checkpoints."""
    folder = tmp_path_factory.mktemp("made") / "run"
    recorder = opened(folder)
    train(recorder, 1, 3)
    recorder.close(0)
    (folder / layout.SETTINGS).write_text(config.to_toml(config.load("digits", None, [])))
    (folder / layout.SUMMARY).write_text(json.dumps(SUMMARY))
    return folder


@pytest.mark.parametrize("bad", [LONG, f"file/{LONG}", "file/folder", "file"])
@pytest.mark.parametrize("line", COMMANDS)
def test_a_path_that_cannot_be_used_is_one_sentence(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, bad: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("this is not what is looked for")
    name, *arguments = line.replace("BAD", bad).replace("RUN", str(run)).replace("OUT", "out").split()
    called: Callable[[list[str]], int] = trainer.main if name == "train" else lambda rest: main([name, *rest])
    assert called(arguments) == BAD_INPUT
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("dist_train: ")
    assert bad in err
    assert (tmp_path / "file").read_text() == "this is not what is looked for"


def test_a_picture_that_cannot_be_used_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    from dist_train.commands.predict import sources

    assert [*sources([LONG, "a.png"])] == [LONG, "a.png"]  # opening it reports it


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `dist-train` is this code's."""
    here = f'dist-train() {{ {shlex.quote(sys.executable)} -m dist_train "$@"; }}; set -o pipefail\n'
    variables = {**environment(), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(["bash", "-c", here + line], cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "line", ["describe block94", "describe block94 --json", "diff RUN RUN", "table GROUP", "--help"]
)
def test_a_reader_that_ends_and_a_full_disk_end_a_command_in_order(run: Path, tmp_path: Path, line: str) -> None:
    line = line.replace("RUN", str(run)).replace("GROUP", str(run.parent))
    ended = shell(f"dist-train {line} | true", tmp_path)
    assert (ended.returncode, ended.stderr) in [(128 + signal.SIGPIPE, ""), (0, "")]
    full = shell(f"dist-train {line} >/dev/full", tmp_path)
    assert full.returncode == BAD_INPUT
    assert full.stderr == (
        "dist_train: the output cannot be written (No space left on device); send it somewhere else\n"
    )


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (">/dev/full 2>&1", ""),
        (">/dev/full", "the output cannot be written (No space left on device) and is dropped; training continues"),
        ("| head -n 1 >/dev/null", "the output cannot be written (Broken pipe) and is dropped; training continues"),
        ("<&- >&- 2>&-", ""),
    ],
)
def test_a_training_goes_on_when_its_output_cannot_be_written(
    digits: Path, tmp_path: Path, output: str, said: str
) -> None:
    settings = shlex.join([f"data.dir={digits}", *TINY, "epochs=1"])
    done = shell(f"dist-train train --preset digits {settings} --run-dir run {output}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (f"dist_train: {said}\n" if said else "")
    assert [row["kind"] for row in lines(tmp_path / "run")].count("step") == 5
    assert (tmp_path / "run" / "summary.json").exists()
