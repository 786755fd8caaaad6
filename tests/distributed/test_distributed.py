"""The environment of a rank."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPOSITORY, environment

from dist_train.distributed.launcher import check_world_size, launched_as, ranks_per_node, wait_for_store
from dist_train.errors import LauncherError, UserError


def test_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name in values:
        monkeypatch.delenv(name, raising=False)
    assert launched_as() == (0, 1, 0)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == (3, 4, 1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(LauncherError, match="but not MASTER_PORT"):
        launched_as()


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
REFUSED = [
    *(("RANK", value) for value in ("-1", "2", "three", "", "1.0", "\u0661", "9" * 5000)),
    *(("WORLD_SIZE", value) for value in ("0", "-2", "1_0", "two", "99999999999")),
    *(("LOCAL_RANK", value) for value in ("-1", "2", "x")),
    *(("LOCAL_WORLD_SIZE", value) for value in ("0", "1", "3", "x")),
    *(("MASTER_PORT", value) for value in ("abc", "-1", "0", "65536", " 80")),
    *(("MASTER_ADDR", value) for value in ("", "two words", "a\nb")),
]


def test_a_rank_waits_for_the_store_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        wait_for_store(0, 0.0)  # the one that holds it
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=r"^none answers within 0\.5 s \(Connection refused\)$"):
            wait_for_store(1, 0.5)
        assert 0.5 < time.monotonic() - begin < 3
        later = threading.Timer(0.5, listener.listen)
        later.start()
        wait_for_store(1, 30.0)
        later.join()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun's agent holds it
    with pytest.raises(RuntimeError, match="none answers"):
        wait_for_store(0, 0.0)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_launcher_variables_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each, right in {**LAUNCHED, name: value}.items():
        monkeypatch.setenv(each, right)
    with pytest.raises(LauncherError, match=f"{name} = .*: give .*; start with torchrun") as refused:
        launched_as()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("words", [["train", "--preset", "digits"], ["evaluate", "nowhere"]])
def test_each_command_on_ranks_refuses_them_before_torch(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dist_train", *words],
        env={**environment(), **LAUNCHED, "RANK": "-1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert line.startswith("dist_train: RANK = '-1': give a whole number from 0 to 1; start with torchrun")
    assert done.returncode == 2
    assert not [name for name in done.stderr.splitlines() if name.endswith("| torch")]


def test_world_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for world_size in (1, 3, 8):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        check_world_size(8)
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(UserError, match="at most 8 ranks, but 9 were started"):
        check_world_size(8)
    assert [ranks_per_node(8, workers) for workers in range(1, 11)] == [1, 2, 3, 4, 4, 4, 4, 8, 8, 8]
    assert [ranks_per_node(8, workers, 2) for workers in range(1, 6)] == [1, 2, 2, 4, 4]
    assert [ranks_per_node(8, workers, 3) for workers in range(1, 6)] == [1, 2, 2, 2, 2]  # 6 ranks: no more than 8
    assert ranks_per_node(8, 4, 8) == 1
