"""The environment of a rank."""

from __future__ import annotations

import pytest

from dist_train.distributed.launcher import check_world_size, launched_as, ranks_per_node
from dist_train.errors import UserError


def test_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name in values:
        monkeypatch.delenv(name, raising=False)
    assert launched_as() == (0, 1, 0)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == (3, 4, 1)
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(UserError, match="whole numbers"):
        launched_as()
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="but not MASTER_PORT"):
        launched_as()


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
