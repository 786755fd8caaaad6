"""Shared by the tests: fixtures with beton files, and functions that run the trainer from its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tests/run.sh runs several files at a time
import forked

REPOSITORY = Path(__file__).parent.parent
# with the preset `digits`: trains in seconds, in the precision that is fast on every CPU
TINY = ["train.epochs=2", "batch_size=256", "precision=fp32", "record.wandb=disabled"]
# the least that summary.json of a made-up run holds, for the commands that read it
SUMMARY: dict[str, Any] = {
    "test_accuracy": 0.9,
    "train_seconds": 10.0,
    "images_per_second": 100.0,
    "weights_sha256": "0" * 64,
    "world_size": 1,
    "device": "CPU",
    "git_commit": None,
}
needs_ffcv = pytest.mark.skipif(not find_spec("ffcv"), reason="ffcv is not installed")
# the test files that take longest run first, so that the workers of tests/run.sh end at about the same time
LONGEST = ["slurm", "interruption", "train", "output", "golden", "elastic", "first_contact", "heartbeat", "faults"]
LONGEST += ["wandb", "selection", "benchmarks", "image_folder", "report", "cifar10", "recipe", "sweep", "install"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files in LONGEST first; the order of other files, and of the tests within a file, is kept."""

    def position(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=position)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons of the handwritten digits."""
    out = tmp_path_factory.mktemp("betons") / "digits"
    command = [sys.executable, "-m", "dist_train.data_prep", "--dataset", "digits", "--out", str(out)]
    forked.run(command, REPOSITORY, environment()).check_returncode()
    return out


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons of CIFAR-10; skips the test where CIFAR10_DIR is unset."""
    if not os.environ.get("CIFAR10_DIR"):
        pytest.skip("CIFAR10_DIR is unset: no CIFAR-10 on this machine")
    out = tmp_path_factory.mktemp("betons") / "cifar10"
    subprocess.run([sys.executable, "-m", "dist_train.data_prep", "--out", str(out)], check=True, cwd=REPOSITORY)
    return out


def environment() -> dict[str, str]:
    """Environment variables for the trainer: those of this process without a launcher's and W&B's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false", "COLUMNS": "100"}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without speeds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def command(
    *arguments: object, ranks: int = 1, module: str = "dist_train.main", torchrun: tuple[str, ...] = ()
) -> list[str]:
    """The command line that starts the trainer, or `module="dist_train COMMAND"`, with torchrun for several ranks.
    torchrun: more of its options."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun, "-m"]
    return [*start, *module.split(), *map(str, arguments)]


def trainer(
    *arguments: object,
    ranks: int = 1,
    timeout: float = 300,
    variables: dict[str, str] | None = None,
    module: str = "dist_train.main",
) -> subprocess.CompletedProcess[str]:
    """Run the trainer, or another module, to its end, in a process that has torch already (forked.py); with several
    ranks that is torchrun. timeout: in seconds. variables: added to the environment, in a process of its own."""
    words = command(*arguments, ranks=ranks, module=module)
    if variables is None:
        return forked.run(words, REPOSITORY, environment(), timeout)
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def train(digits: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that trains the preset `digits` for two epochs and returns the run's summary."""

    def run(name: str, *arguments: object, ranks: int = 1) -> dict[str, Any]:
        folder = tmp_path / name
        words = command("--preset", "digits", f"data.dir={digits}", *TINY, *arguments, "--run-dir", folder)
        done = forked.run(words, REPOSITORY, environment(), 300, ranks)
        assert done.returncode == 0, done.stderr
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return summary

    return run
