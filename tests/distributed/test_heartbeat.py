"""A rank that dies or hangs is noticed by the others, and named with its step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import silent_waits
import torch
from peers import run_ranks
from torch._C._distributed_c10d import TCPStore

from dist_train.distributed.heartbeat import Heartbeat
from dist_train.distributed.ranks import Ranks, gather_shares, join_ranks

TIMEOUT = 4


def exchange_until_lost(folder: Path, how: str, timeout: int = TIMEOUT, silent: bool = False) -> None:
    """Rank 1 fails in step 7; the others continue until they notice."""
    log = os.open(folder / f"{os.environ['RANK']}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 2)
    if silent:
        silent_waits.install()
    with join_ranks("cpu", threads=1, deterministic=True, timeout=timeout) as here:
        for step in range(1, 100):
            here.begin(step)
            gather_shares(here, torch.ones(1), here.world_size)
            time.sleep(0.2)  # for a sign of life in the last step
            if step == 7 and here.rank == 1:
                (folder / "fault").touch()
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


@pytest.mark.parametrize("how", ["dies", "fails", "stands still"])
def test_a_rank_that_ends_is_named_within_ten_seconds_where_no_wait_raises(tmp_path: Path, how: str) -> None:
    ending = 2 if how == "stands still" else 3
    answers = run_ranks(3, exchange_until_lost, tmp_path, how, 600, True, answering=ending, timeout=60)
    assert [answers[rank].code for rank in (0, 2)] == [1, 1]
    said = (tmp_path / "0.log").read_text()
    assert said.startswith("dist_train: rank 1 (process ")
    state = "has failed (RuntimeError: out of luck)" if how == "fails" else "is gone"
    assert said.endswith(f" {state}; rank 0 was waiting for it in step 8\n")
    assert (tmp_path / "0.log").stat().st_mtime - (tmp_path / "fault").stat().st_mtime < 10
    assert "dist_train: " not in (tmp_path / "2.log").read_text()


def pause() -> float:
    with join_ranks("cpu", threads=1, deterministic=True, timeout=20) as here:
        if here.rank == 1:
            time.sleep(9)
        gather_shares(here, torch.ones(1), 2)
        if here.rank == 1:  # at least as long as tests/faults.py has a rank stand still
            subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return float(gather_shares(here, torch.ones(1), 2).sum())


def test_a_rank_that_is_only_slow_is_waited_for() -> None:
    assert [answer.value for answer in run_ranks(2, pause)] == [2.0, 2.0]


def fail_by_itself() -> None:
    with join_ranks("cpu", threads=1, deterministic=True, timeout=20) as here:
        gather_shares(here, torch.ones(1), 3)
        if here.rank == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if here.rank == 1:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        time.sleep(5)  # further behind than a rank that hangs
        gather_shares(here, torch.ones(1), 3)


def test_errors_of_a_gpu_are_not_blamed_on_a_rank_that_is_behind() -> None:
    slow, device, memory = run_ranks(3, fail_by_itself)
    assert memory.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert device.error.startswith("DeviceError: rank 1: CUDA error: an illegal memory access was encountered (CPU of ")
    assert "Compile with" not in device.error
    # the error of rank 0's own connection is shown too
    assert slow.error.startswith("LostPeerError: rank 1 (process ")
    assert " has failed (AcceleratorError: CUDA error: an illegal memory access was encountered); " in slow.error
    assert re.search(r"rank 0 was waiting for it in step 0 \(\w+ [^.]+ peer[^()]*\)$", slow.error)


@pytest.fixture
def heartbeats(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Heartbeat]]:
    """Those of three ranks, in this process."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    three = [Heartbeat(rank, 3, 600, "start") for rank in range(3)]
    yield three
    for each in three:
        each.close()


def test_of_two_ranks_that_are_behind_the_one_that_the_other_waits_for_is_blamed(heartbeats: list[Heartbeat]) -> None:
    """Ranks with GPUs queue different numbers of exchanges before they block."""
    for heartbeat, exchanges in zip(heartbeats, (7, 6, 4), strict=True):
        heartbeat.exchanges = exchanges
    lost = heartbeats[0].lost(TimeoutError("waited 600 s, train.timeout"))
    assert lost is not None
    assert str(lost).startswith("rank 2 (process ")
    assert str(lost).endswith("rank 0 was waiting for it in step 0 (waited 600 s, train.timeout)")
    assert heartbeats[1].lost(RuntimeError("an error of this rank")) is None


def test_the_hosts_wait_for_a_gpu_counts_as_waiting(
    heartbeats: list[Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat, waits = heartbeats[0], []

    class Stream:
        def synchronize(self) -> None:
            waits.append(heartbeat.waiting_since)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    gpu = torch.device("cuda", 0)
    here = Ranks(0, 3, gpu, gpu, heartbeat)
    with here.exchange():
        pass
    assert waits.pop()
    assert heartbeat.waiting_since is None
    with here.exchange(queued=True):  # the gradient sum: the host continues until a queue of the GPU is full
        pass
    assert not waits
    assert heartbeat.waiting_since
    with here.exchange():
        pass
    assert heartbeat.waiting_since is None
    with Ranks(0, 3, gpu, torch.device("cpu"), heartbeat).exchange(queued=True):
        pass
    assert heartbeat.waiting_since is None
    assert len(waits) == 1
