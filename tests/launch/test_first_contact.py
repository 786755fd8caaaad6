"""The trainer as it is first met: in a folder without a data set, without a network, and with mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, command, environment
from PIL import Image

from dist_train import config

NOWHERE = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")
DIGITS = ["--preset", "digits", *TINY, "epochs=1"]


def variables(folder: Path, **more: str) -> dict[str, str]:
    """Of somebody who starts in a folder of his own, and has no CIFAR-10."""
    kept = {name: value for name, value in environment().items() if name not in ("CIFAR10_DIR", "NO_PROXY", "no_proxy")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(folder / "cache"), **more}


def start(
    folder: Path,
    *arguments: object,
    ranks: int = 1,
    launcher: tuple[str, ...] = (),
    more: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start the trainer in a folder. launcher: options of torchrun, in place of those that `ranks` gives. more: of the
    environment."""
    words = command(*arguments, ranks=ranks)
    if launcher:
        torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher]
        words = [*torchrun, "-m", "dist_train.main", *map(str, arguments)]
    return subprocess.Popen(
        words,
        cwd=folder,
        env=variables(folder, **(more or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], timeout: float = 200) -> tuple[str, str]:
    """(stdout, stderr) of a process that has ended."""
    try:
        return process.communicate(timeout=timeout)
    finally:
        process.kill()


def said(stderr: str) -> list[str]:
    """What the trainer and data_prep say, apart from what their launcher does."""
    return [line for line in stderr.splitlines() if line.startswith(("dist_train: ", "data_prep: "))]


def exit_codes(stderr: str) -> list[int]:
    """Of the ranks, in torchrun's summary."""
    return [int(code) for code in re.findall(r"exitcode  : (-?\d+)", stderr)]


def summary(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / "summary.json").read_text())
    return found


def test_four_ranks_in_a_fresh_folder_have_one_write_the_data_set(tmp_path: Path) -> None:
    four = start(tmp_path, *DIGITS, "--run-dir", "fresh", ranks=4)
    _, stderr = ended(four)
    assert four.returncode == 0, stderr
    assert [line for line in said(stderr) if "the other ranks" not in line] == [
        "data_prep: writing digits into data/digits"
    ]
    assert sum("wait for the first, which prepares it" in line for line in said(stderr)) <= 1
    one = start(tmp_path, *DIGITS, "--run-dir", "again")
    _, stderr = ended(one)
    assert one.returncode == 0, stderr
    assert not said(stderr)  # nothing to be written
    # what the first rank of the other run did before it trained has left no trace in its weights
    assert summary(tmp_path / "fresh")["weights_sha256"] == summary(tmp_path / "again")["weights_sha256"]


@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes_write_once_on_a_shared_disk_and_each_on_its_own(tmp_path: Path, shared: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in range(2):
        launcher = ("--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}")
        where = f"data.dir={tmp_path / ('betons' if shared else f'betons{node}')}"
        arguments = [*DIGITS, where, "--run-dir", tmp_path / "run"]
        nodes.append(start(tmp_path, *arguments, launcher=(*launcher, "--nproc-per-node=1")))
    texts = [ended(node)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    writers = [sum("data_prep: writing" in line for line in said(text)) for text in texts]
    assert sum(writers) == 1 if shared else writers == [1, 1]
    assert summary(tmp_path / "run")["world_size"] == 2


def test_images_of_ones_own_are_prepared_too(tmp_path: Path) -> None:
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(40):
            shade = tuple(value + number for value in colour)
            Image.new("RGB", (20, 16), shade).save(tmp_path / "images" / name / f"{number}.png")
    own = ["data.dataset=colours", "data.source=images", "data.image_size=16", "batch_size=32", "flip=none"]
    two = start(tmp_path, *DIGITS, *own, "--run-dir", "run", ranks=2)
    _, stderr = ended(two)
    assert two.returncode == 0, stderr
    assert sum("writing colours into data/colours" in line for line in said(stderr)) == 1
    assert summary(tmp_path / "run")["dataset"] == "colours"


@pytest.mark.parametrize("ranks", [1, 3])
def test_without_a_network_one_sentence_says_what_to_do(tmp_path: Path, ranks: int) -> None:
    process = start(tmp_path, ranks=ranks, more=NOWHERE)
    stdout, stderr = ended(process)
    (line,) = [line for line in said(stderr) if not re.search("the other ranks|data_prep: downloading", line)]
    assert line.startswith("dist_train: CIFAR-10 could not be downloaded from https://")
    assert "set CIFAR10_DIR to the folder that contains cifar-10-batches-py, or" in line
    assert line.endswith("--preset digits")
    assert not stdout
    if ranks == 1:
        assert (process.returncode, len(stderr.splitlines())) == (2, 2)
    else:
        assert 2 in exit_codes(stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_stop_while_downloading_ends_it_at_once(tmp_path: Path, number: signal.Signals, ranks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = start(tmp_path, ranks=ranks, more={"HTTPS_PROXY": proxy, "https_proxy": proxy})
        silent.settimeout(120)
        connection, _ = silent.accept()
        with connection:
            time.sleep(0.5)
            begin = time.monotonic()
            process.send_signal(number)
            _, stderr = ended(process)
    assert time.monotonic() - begin < 10
    name = number.name
    assert f"dist_train: stopped by {name} before the training began; the same command starts it" in said(stderr)
    if ranks == 1:
        assert process.returncode == 75
        assert [line.partition(" CIFAR-10 into")[0] for line in stderr.splitlines()[:-1]] == ["data_prep: downloading"]
    else:
        assert "Stopped" not in stderr  # torchrun has a traceback of its own
    assert not list((tmp_path / "data").glob(".*.dist_train"))


def test_a_server_that_does_not_answer_times_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = start(tmp_path, more={"HTTPS_PROXY": proxy, "https_proxy": proxy})
        _, stderr = ended(process, 100)
    assert process.returncode == 2
    assert "could not be downloaded" in stderr
    assert "timed out" in stderr
    assert len(stderr.splitlines()) == 2


Mistake = Callable[[Path, Path], list[object]]


def _damaged(folder: Path, digits: Path) -> list[object]:
    shutil.copytree(digits, folder / "damaged")
    os.truncate(folder / "damaged" / "train.beton", 100_000)
    return ["data.dir=damaged"]


def _file(folder: Path, _: Path) -> list[object]:
    (folder / "file").touch()
    return ["data.dir=file"]


def _below_a_file(folder: Path, digits: Path) -> list[object]:
    (folder / "file").touch()
    return [f"data.dir={digits}", "--run-dir", "file/run"]


def _toml(folder: Path, _: Path) -> list[object]:
    (folder / "bad.toml").write_text("[model\n")
    return ["--config", "bad.toml"]


def _other_run(folder: Path, digits: Path) -> list[object]:
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text(config.to_toml(config.load("digits", None, ["seed=5"])))
    return [f"data.dir={digits}", "--run-dir", "run"]


def _foreign(folder: Path, _: Path) -> list[object]:
    (folder / "own").mkdir()
    (folder / "own" / "notes.txt").touch()
    return ["data.dir=own"]


MISTAKES: dict[str, tuple[Mistake, str]] = {
    "setting": (lambda *_: ["epohcs=3"], "epohcs: there is no such setting; did you mean train.epochs?"),
    "type": (lambda *_: ["epochs=many"], 'train.epochs = "many": input should be a valid number'),
    "no value": (lambda *_: ["seed"], "seed: settings are written key=value"),
    "option": (lambda *_: ["--sede", "1"], "unrecognized arguments: --sede"),
    "preset": (lambda *_: ["--preset", "digit"], "--preset digit: there is no such preset; did you mean digits?"),
    "TOML": (_toml, "bad.toml: not valid TOML"),
    "no file": (lambda *_: ["--config", "absent.toml"], "--config absent.toml: cannot be read"),
    "batch": (lambda *_: ["batch_size=250"], "train.batch_size = 250 does not split into train.microbatches = 8"),
    "other run": (_other_run, "--run-dir run belongs to a run with another train"),
    "no run folder": (_below_a_file, "--run-dir file/run: cannot be written"),
    "damaged": (_damaged, "damaged/train.beton has 100000 bytes where manifest.json has"),
    "file": (_file, "data.dir = file is a file"),
    "foreign": (_foreign, "own/manifest.json is missing"),
    "data set": (lambda *_: ["data.dataset=cats"], "data.dataset = cats: there is no such data set"),
    "size": (lambda *_: ["data.dataset=cats", "data.source=."], "data.image_size = 0"),
    "source": (
        lambda *_: ["data.dataset=cats", "data.source=absent", "image_size=8"],
        "data.source absent is not a folder: give one with a folder of images for each class",
    ),
    "CIFAR10_DIR": (lambda *_: ["data.dataset=cifar10"], "CIFAR10_DIR /absent holds no folder cifar-10-batches-py"),
    "translate": (lambda _, digits: [f"data.dir={digits}", "translate=40"], "data.translate = 40 shifts images"),
    "architecture": (
        lambda _, digits: [f"data.dir={digits}", "model.blocks.0.convolutions=[{}, {padding=0}]"],
        "block 1, convolution 2",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_before_torch_is_imported(name: str, digits: Path, tmp_path: Path) -> None:
    mistake, sentence = MISTAKES[name]
    arguments = ["--preset", "digits", *mistake(tmp_path, digits)]
    # the first of many ranks speaks, and as soon as it can: torch alone takes seconds
    words = [sys.executable, "-X", "importtime", "-m", "dist_train.main", *map(str, arguments)]
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        words, cwd=tmp_path, env=variables(tmp_path, CIFAR10_DIR="/absent"), capture_output=True, text=True, timeout=60
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic" in imported
    assert not imported & {"torch", "torchvision", "ffcv", "sklearn", "wandb", "matplotlib"}
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert line.startswith("dist_train: ")
    assert sentence in line
    assert done.returncode == 2
    assert not done.stdout
    left = {path.name for path in tmp_path.rglob("*")} - {path.name for path in before}
    assert left <= {"data", ".cifar10.lock", ".cats.lock"}


@pytest.mark.parametrize(("name", "ranks"), [("setting", 2), ("setting", 4), ("other run", 4), ("damaged", 2)])
def test_only_one_of_several_ranks_prints(name: str, ranks: int, digits: Path, tmp_path: Path) -> None:
    mistake, sentence = MISTAKES[name]
    process = start(tmp_path, "--preset", "digits", *mistake(tmp_path, digits), ranks=ranks)
    _, stderr = ended(process)
    assert process.returncode == 1  # torchrun's
    (line,) = said(stderr)
    assert sentence in line
    codes = exit_codes(stderr)
    # older versions of torchrun list only the first that failed
    assert set(codes) == {2} if name != "damaged" else 2 in codes
    assert stderr.count("Traceback") == 1  # torchrun's


def test_more_ranks_than_microbatches(tmp_path: Path) -> None:
    process = start(tmp_path, "--preset", "digits", "microbatches=2", ranks=3)
    _, stderr = ended(process)
    assert set(exit_codes(stderr)) == {2}
    assert "train.microbatches = 2 gives work to at most 2 ranks, but 3 were started" in said(stderr)[0]


def test_a_read_only_data_set_is_sufficient(digits: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "digits"
    mounted.mkdir()
    script = f"mount --bind {digits} {mounted} && mount -o remount,bind,ro {mounted} && ! touch {mounted}/x 2>/dev/null"
    inside = ["unshare", "--mount", "bash", "-c"]
    possible = None
    with suppress(FileNotFoundError):
        possible = subprocess.run([*inside, script], capture_output=True, check=False)
    if possible is None or possible.returncode:
        pytest.skip("no read-only mounts here: that takes root")
    train = " ".join(map(str, command(*DIGITS, f"data.dir={mounted}", "--run-dir", tmp_path / "run", ranks=2)))
    done = subprocess.run(
        [*inside, f"{script}; exec {train}"],
        cwd=tmp_path,
        env=variables(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert not said(done.stderr)
