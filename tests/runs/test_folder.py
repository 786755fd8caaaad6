"""Opening a run folder: it may hold files of somebody else, which stay as they are."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from dist_train import config
from dist_train.config.settings import Config
from dist_train.data_prep.files import locked
from dist_train.errors import UserError
from dist_train.files import write_atomic
from dist_train.runs import layout
from dist_train.runs.folder import open_folder

FOREIGN = (
    *(".notes.2024", ".vimrc.1", ".config.toml.1", ".metrics.jsonl.2024", ".summary.json.dist_train", "config.toml~"),
    *("checkpoints/step-00000099-mine.pt", "checkpoints/step-best.pt", "checkpoints/step-9.pt", "checkpoints/.keep.3"),
    *("checkpoints/step-000000099.pt", "checkpoints/step-00000099.pt.bak", "checkpoints/step-best.pt.sha256"),
)


@pytest.fixture(scope="module")
def settings() -> Config:
    return config.load("digits", None, [])


def opened(run_dir: Path, settings: Config) -> Path | None:
    with ExitStack() as held:
        return open_folder(run_dir, settings, held)


def test_files_of_somebody_else_stay(tmp_path: Path, settings: Config) -> None:
    assert opened(tmp_path, settings) is None
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    ours = (".summary.json.4711.dist_train", "checkpoints/.step-00000007.pt.12.dist_train")
    for name in (*ours, "checkpoints/step-00000007.pt.sha256"):
        (tmp_path / name).write_text("half")
    assert opened(tmp_path, settings) is None
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*FOREIGN, ".lock", "config.toml"}
    assert all((tmp_path / name).read_text() == name for name in FOREIGN)


@pytest.mark.parametrize("name", [".lock", *layout.RECORD, "config.toml", "plots", "system", "wandb"])
def test_nothing_is_written_through_a_link(tmp_path: Path, settings: Config, name: str) -> None:
    target = tmp_path / "theirs"
    if name in ("checkpoints", "plots", "system", "wandb"):
        target.mkdir()
    else:
        target.write_text("theirs")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / name).symlink_to(target)
    with pytest.raises(UserError, match=rf"--run-dir {run_dir}: {name} in it is a symbolic link, .* remove the link"):
        opened(run_dir, settings)
    assert target.is_dir() or target.read_text() == "theirs"
    assert [path.name for path in run_dir.iterdir()] == [name]


@pytest.mark.parametrize("name", layout.RECORD)
def test_a_folder_that_is_not_of_a_run_is_refused(tmp_path: Path, settings: Config, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match=f"holds {name}, but no config.toml of a run; restore that, or name another"):
        opened(tmp_path, settings)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_results_without_a_checkpoint_are_not_started_over(tmp_path: Path, settings: Config) -> None:
    opened(tmp_path, settings)
    (tmp_path / layout.SUMMARY).write_text("{}")
    with pytest.raises(UserError, match=r"holds the results of a run, but no checkpoint of it; name another folder"):
        opened(tmp_path, settings)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_and_said(
    tmp_path: Path, settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert opened(tmp_path, settings) is None
    with locked(tmp_path / ".table.lock"):
        pass
    assert [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"dist_train: {tmp_path / name} cannot be locked" for name in (".lock", ".table.lock")
    ]


def test_a_link_and_a_pipe_in_place_of_a_file(tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.write_text("theirs")
    link.symlink_to(theirs)
    (tmp_path / f".link.{os.getpid()}.dist_train").symlink_to(theirs)
    write_atomic(link, b"ours")
    assert (theirs.read_text(), link.read_text(), link.is_symlink()) == ("theirs", "ours", False)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, b"ours")
    assert os.read(reader, 10) == b"ours"
    os.close(reader)
    assert pipe.is_fifo()
