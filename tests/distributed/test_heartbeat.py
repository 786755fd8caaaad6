"""A rank that dies or hangs is noticed by the others, and named with its step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from peers import run_ranks

from dist_train.distributed.ranks import gather_shares, join_ranks

TIMEOUT = 4


def exchange_until_lost(folder: Path, how: str) -> None:
    """Rank 1 fails in step 7; the others continue until they notice."""
    log = os.open(folder / f"{os.environ['RANK']}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    with join_ranks("cpu", threads=1, deterministic=True, timeout=TIMEOUT) as here:
        for step in range(1, 100):
            here.begin(step)
            gather_shares(here, torch.ones(1), here.world_size)
            time.sleep(0.2)  # for a sign of life in the last step
            if step == 7 and here.rank == 1:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif how == "stands still":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "hangs":
                    time.sleep(600)
                raise RuntimeError("out of luck")


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_a_rank_that_ends_is_named(tmp_path: Path, how: str) -> None:
    begin = time.monotonic()
    answers = run_ranks(3, exchange_until_lost, tmp_path, how)
    assert time.monotonic() - begin < 30
    state = "is gone" if how == "dies" else "has failed (RuntimeError: out of luck)"
    for rank in (0, 2):
        error = answers[rank].error
        assert error.startswith("LostPeerError: rank 1 (process ")
        assert state in error
        assert f"rank {rank} was waiting for it in step 8" in error
    if how == "fails":
        assert answers[1].error == "RuntimeError: out of luck"  # its own
    else:
        assert answers[1].code == -signal.SIGKILL


@pytest.mark.parametrize("how", ["stands still", "hangs"])
def test_a_rank_that_hangs_is_noticed_within_the_timeout(tmp_path: Path, how: str) -> None:
    answers = run_ranks(3, exchange_until_lost, tmp_path, how, answering=2, timeout=60)
    assert [answer.code for answer in answers] == [1, None, 1]
    said = (tmp_path / "0.log").read_text()
    assert said.startswith("dist_train: rank 1 (process ")
    assert "last seen in step " in said
    assert ("is gone" if how == "stands still" else "hangs, although its process lives") in said
    assert f"rank 0 was waiting for it in step 8 (waited {TIMEOUT} s, train.timeout)" in said
    assert "dist_train: " not in (tmp_path / "2.log").read_text()  # one rank speaks for those that are left


def pause(folder: Path) -> float:
    with join_ranks("cpu", threads=1, deterministic=True, timeout=TIMEOUT) as here:
        if here.rank == 1:
            time.sleep(TIMEOUT - 2)
        return float(gather_shares(here, torch.ones(1), 2).sum())


def test_a_rank_that_is_only_slow_is_waited_for(tmp_path: Path) -> None:
    assert [answer.value for answer in run_ranks(2, pause, tmp_path)] == [2.0, 2.0]
