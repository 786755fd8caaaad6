"""What a checkpoint holds; checkpoints appear whole or not at all, and damaged ones are set aside."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import config, load
from dist_train.config.settings import Config
from dist_train.errors import UserError
from dist_train.model.network import BlockNetwork
from dist_train.runs import checkpoint
from dist_train.runs.checkpoint import Checkpoint, DataDescription, Writer

DATA = DataDescription(
    "letters", ("a", "b"), (32, 32, 3), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), {"train": "1", "test": "2"}
)
STATE: dict[str, Any] = {
    "step": 7,
    "model": {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3, dtype=torch.int64)},
    "optimizers": [{"state": {0: {"momentum": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}],
    "scaler": {"scale": 1.0},
    "environments": [{"torch": "2.15.0"}],
}


def test_a_checkpoint_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    holds = Checkpoint(**STATE, config="seed = 1", data=DATA)
    path = checkpoint.save(tmp_path, 7, holds.to_dict(), 1)
    state = checkpoint.load(path)
    assert [*state] == [*STATE, "config", "data"]
    assert state["data"] == {
        "dataset": "letters",
        "classes": ["a", "b"],
        "image_shape": [32, 32, 3],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "content_sha256": {"train": "1", "test": "2"},
        "grey_bits": None,
    }
    again = checkpoint.read(path)
    assert (again.step, again.scaler, again.environments) == (7, STATE["scaler"], STATE["environments"])
    assert (again.config, again.data) == ("seed = 1", DATA)
    assert [*again.model] == ["b", "a"]
    assert all(torch.equal(tensor, again.model[name]) for name, tensor in STATE["model"].items())


def test_checkpoints_of_earlier_versions() -> None:
    """Without configuration and data set, without the digests of that, and with statistics of each microbatch."""
    found = Checkpoint.from_dict(STATE)
    assert (found.config, found.data) == (None, None)
    assert found.to_dict() == STATE
    older = {"norm.rows_mean": torch.tensor([[1.0], [3.0]]), "norm.rows_var": torch.tensor([[2.0], [6.0]])}
    assert Checkpoint.from_dict({**STATE, "model": older}).model == {"norm.mean": 2, "norm.var": 4}
    described = {key: value for key, value in DATA.to_dict().items() if key != "content_sha256"}
    data = Checkpoint.from_dict({**STATE, "config": "", "data": described}).data
    assert data is not None
    assert (data.classes, data.content_sha256) == (("a", "b"), {})


@pytest.mark.parametrize("state", [None, [], {}, {"step": 1}, {"step": 1, "model": {}, "data": {"dataset": "x"}}])
def test_other_files_are_not_checkpoints(state: Any) -> None:
    with pytest.raises(ValueError, match=r"it is not a checkpoint of dist_train"):
        Checkpoint.from_dict(state)


def test_digests_of_tensors() -> None:
    digests = checkpoint.tensor_digests(Checkpoint(**STATE))
    assert [*digests] == ["b", "a", "optimizers.0.state.0.momentum"]
    assert digests["b"] == hashlib.sha256(STATE["model"]["b"].numpy().tobytes()).hexdigest()


def saved(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"step": step, "weights": torch.full((3,), float(step))}, keep)


def test_the_newest_are_kept_with_checksums_that_sha256sum_takes(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 100, 15)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000015.pt", "step-00000100.pt"]
    assert len(list(tmp_path.iterdir())) == 4
    for file in tmp_path.glob("*.sha256"):
        subprocess.run(["sha256sum", "--check", "--quiet", file.name], cwd=tmp_path, check=True)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest)["step"] == 100
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncated", "altered", "no checksum"])
def test_a_damaged_newest_one_is_set_aside_and_named(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 5, 10)
    path = tmp_path / "step-00000010.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.with_name(path.name + ".sha256").unlink()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest)["step"] == 5
    assert str(path) in capsys.readouterr().err
    assert path.with_name(path.name + ".damaged").exists()


def test_a_failed_write_keeps_the_last_checkpoint_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 5)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path, 10)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005.pt", "step-00000005.pt.sha256"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest)["step"] == 5


def writer(folder: Path, failures: list[tuple[int, Exception]], before: Callable[[], None] = lambda: None) -> Writer:
    return Writer(
        folder,
        2,
        {"by": "test"},
        before=before,
        written=lambda _: None,
        failed=lambda step, error: failures.append((step, error)),
    )


def test_the_writer_copies_the_state(tmp_path: Path) -> None:
    failures: list[tuple[int, Exception]] = []
    wrote = writer(tmp_path, failures)
    weights = torch.zeros(1000)
    for step in (1, 2, 3):
        wrote.write(step, {"step": step, "nested": [{"weights": weights, "lr": 0.1, "group": (1, None)}]})
        weights += 1
    assert wrote.wait() is None
    assert checkpoint.steps(tmp_path) == [2, 3]
    for step in (2, 3):
        state = checkpoint.load(tmp_path / f"step-{step:08d}.pt")
        assert state["by"] == "test"
        assert state["nested"][0]["group"] == (1, None)
        assert torch.equal(state["nested"][0]["weights"], torch.full((1000,), step - 1.0))
    assert not failures


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), MemoryError(), RuntimeError("on purpose")])
def test_the_writer_reports_a_failed_write_and_continues(tmp_path: Path, failure: Exception) -> None:
    failures: list[tuple[int, Exception]] = []
    full = [False]

    def before() -> None:
        if full[0]:
            raise failure

    wrote = writer(tmp_path, failures, before)
    wrote.write(1, {"step": 1})
    assert wrote.wait() is None
    full[0] = True
    wrote.write(2, {"step": 2})
    assert wrote.wait() is failure
    assert failures == [(2, failure)]
    assert checkpoint.steps(tmp_path) == [1]
    full[0] = False
    wrote.write(3, {"step": 3})
    assert wrote.wait() is None
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    (tmp_path / ".step-00000010.pt.4711.dist_train").write_bytes(b"half of it")
    (tmp_path / "step-00000010.pt.sha256").write_text("0" * 64)
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005.pt", "step-00000005.pt.sha256"]


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/tmp/dist_train_ran_code"),))


def test_loading_runs_no_code_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"step": Malicious()}, path)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(path)
    assert not Path("/tmp/dist_train_ran_code").exists()


def state_of(network: BlockNetwork, settings: Config) -> dict[str, Any]:
    holds = Checkpoint(7, network.state_dict(), environments=[{"torch": "2"}], config=config.to_toml(settings))
    return {**holds.to_dict(), "data": {**DATA.to_dict(), "classes": [f"class {n}" for n in range(10)]}}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    settings = config.load("digits", None, [])
    network = BlockNetwork(settings.model, (3, 32, 32), 10)
    return state_of(network, settings)


def described(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, "data": {**state["data"], **entries}}


def with_weights(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    def changed(state: dict[str, Any]) -> Any:
        name = next(name for name, tensor in state["model"].items() if tensor.ndim > 1)
        return {**state, "model": {**state["model"], name: change(state["model"][name])}}

    return changed


CONTENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda _: [1, 2, 3],
    "a step in words": lambda state: {**state, "step": "seven"},
    "a step below zero": lambda state: {**state, "step": -1},
    "class names that are numbers": described(classes=list(range(10))),
    "one class name": described(classes="0123456789"),
    "no class": described(classes=[]),
    "a mean of one number": described(mean=[0.5]),
    "a deviation of zero": described(std=[0.1, 0.0, 0.1]),
    "a mean that is not finite": described(mean=[0.1, float("nan"), 0.1]),
    "a shape of two numbers": described(image_shape=[32, 32]),
    "a shape in floats": described(image_shape=[32.0, 32.0, 3.0]),
    "a huge shape": described(image_shape=[10**9, 10**9, 3]),
    "environments in words": lambda state: {**state, "environments": "torch"},
    "settings that are no text": lambda state: {**state, "config": 7},
    "settings that are no TOML": lambda state: {**state, "config": "[" * 100_000},
    "a huge network": lambda state: {**state, "config": state["config"].replace("channels = 32", "channels = 9999999")},
    "weights that are no tensor": with_weights(lambda _: [1.0]),
    "weights of another shape": with_weights(lambda tensor: tensor[:1].clone()),
    "weights of another type": with_weights(lambda tensor: tensor.double()),
    "weights larger than the file": with_weights(lambda _: torch.zeros(1).expand(10**12)),
    "weights missing": lambda state: {**state, "model": {}},
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_right_checksum_around_junk_is_one_sentence(made: dict[str, Any], tmp_path: Path, what: str) -> None:
    path = checkpoint.save(tmp_path, 7, made, 1)
    assert load(path, "cpu").step == 7
    path = checkpoint.save(tmp_path, 7, CONTENTS[what](made), 1)
    with pytest.raises(
        UserError, match=rf"^{path}: (is damaged, or not a file|does not fit this version) of dist_train"
    ):
        load(path, "cpu")


def test_a_checkpoint_is_not_unpacked_beyond_its_size(made: dict[str, Any], tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 7, {**made, "padding": torch.zeros(10**6)}, 1)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    assert packed.stat().st_size < path.stat().st_size / 2
    with pytest.raises(UserError, match=r"\(it is compressed\)"):
        load(packed, "cpu")


@pytest.mark.parametrize("damage", ["altered", "no checksum"])
def test_where_all_are_damaged_none_is_touched(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 5, 10)
    for path in tmp_path.glob("*.pt" if damage == "altered" else "*.sha256"):
        path.write_bytes(b"junk")
        if damage == "no checksum":
            path.unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"^checkpoint {tmp_path}/step-00000010.pt .* or remove the folder {tmp_path}"
        ):
            checkpoint.newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
