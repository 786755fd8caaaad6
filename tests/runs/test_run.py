"""Reading a run folder: the attributes of a run, and one sentence from every command for damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SUMMARY

from dist_train import config, errors
from dist_train.__main__ import main
from dist_train.errors import UserError
from dist_train.launch import submit
from dist_train.main import main as train
from dist_train.model.network import BlockNetwork, weights_digest
from dist_train.runs import checkpoint, layout
from dist_train.runs.checkpoint import Checkpoint, DataDescription
from dist_train.runs.history import append_history
from dist_train.runs.run import Run, members

CPU = {"torch": "2.15.0", "device": "CPU"}
CLASSES = tuple(f"digit {number}" for number in range(10))
DATA = DataDescription("digits", CLASSES, (32, 32, 3), (0.3, 0.3, 0.3), (0.3, 0.3, 0.3), {"train": "a", "test": "b"})
EVALUATION: dict[str, Any] = {
    "dataset": "digits",
    "split": "test",
    "step": 2,
    "images": 10,
    "loss": 0.5,
    "accuracy": 0.9,
    "classes": CLASSES,
    "confusion": [[int(i == j) for i in range(10)] for j in range(10)],
    "calibration": {"ece": 0.1, "bins": [{"from": 0.0, "count": 10, "confidence": 0.8, "accuracy": 0.9}]},
    "coefficients": [{"branches": ["3x3"], "mean": [0.5], "std": [0.1], "by_class": [[0.5]] * 10}],
    "wrong": [{"index": 3, "label": 1, "predicted": 2, "confidence": 0.7, "png": ""}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A group with one run that is done, made up but for its checkpoint."""
    group = tmp_path_factory.mktemp("runs") / "group"
    folder = group / "seed0"
    folder.mkdir(parents=True)
    settings = config.load("digits", None, ["artifacts=last"])
    model = BlockNetwork(settings.model, DATA.image_shape[::-1], len(CLASSES))
    holds = Checkpoint(2, model.state_dict(), environments=[CPU], config=config.to_toml(settings), data=DATA)
    checkpoint.save(layout.checkpoint_folder(folder), 2, holds.to_dict(), 2)
    rows = [{"kind": "step", "step": step, "epoch": step / 2, "loss": 1.0, "lr": 0.1} for step in (1, 2)]
    (folder / layout.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / layout.SETTINGS).write_text(config.to_toml(settings))
    (folder / layout.SUMMARY).write_text(json.dumps({**SUMMARY, "weights_sha256": weights_digest(model)}))
    (folder / layout.EVALUATION).write_text(json.dumps(EVALUATION))
    append_history(folder, "start", step=0, world_size=1, host="here", environment=CPU)
    append_history(folder, "end", outcome="done", step=2, reason="")
    (group / layout.MEMBERS).write_text(json.dumps({"seed0": ["seed=0"], "seed1": ["seed=1"]}))
    return group


@pytest.fixture
def group(made: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged, beside an intact one."""
    shutil.copytree(made / "seed0", tmp_path / "intact")
    return Path(shutil.copytree(made, tmp_path / "group"))


# what a run tells


def test_a_run_that_is_done(group: Path) -> None:
    run = Run(group / "seed0")
    assert (run.begun, run.done, run.state, run.outcome) == (True, True, "done", "done")
    assert (run.name, run.ranks, run.device) == ("seed0", 1, "CPU")
    assert run.settings == config.load("digits", None, ["artifacts=last"])
    assert [row["step"] for row in run.steps] == [1, 2]
    assert (run.evals, run.digests) == ([], {})
    assert run.evaluation == json.loads(json.dumps(EVALUATION))
    assert run.environment() == {"torch": ["2.15.0"], "device": ["CPU"], "world_size": [1]}
    assert run.checkpoints == {2: group / "seed0" / "checkpoints" / "step-00000002.pt"}
    run.check()


def test_the_states_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert Run(folder).state == "not begun"
    assert (Run(folder).history, Run(folder).summary, Run(folder).checkpoints) == ([], {}, {})
    folder.mkdir()
    (folder / layout.SETTINGS).write_text(config.to_toml(config.load("digits", None, ["name=mine"])))
    assert (Run(folder).state, Run(folder).name, Run(folder).steps) == ("not ended", "mine", [])
    assert (Run(folder).ranks, Run(folder).device) == (None, "")
    append_history(folder, "start", step=0, world_size=2, environment={**CPU, "threads": 1})
    assert Run(folder).state == "not ended"
    append_history(folder, "end", outcome="preempted", step=12, reason="SIGTERM")
    assert Run(folder).state == "preempted at step 12"
    append_history(folder, "start", step=12, world_size=4, environment={"torch": "3.0", "device": "GPU"})
    run = Run(folder)
    assert (run.state, run.ranks, run.device) == ("not ended", 4, "GPU")
    assert run.environment()["torch"] == ["2.15.0", "3.0"]
    assert run.environment(before=12)["torch"] == ["2.15.0"]
    (folder / layout.SUMMARY).write_text(json.dumps({**SUMMARY, "world_size": 8}))
    assert (Run(folder).state, Run(folder).ranks) == ("done", 8)
    (folder / layout.HISTORY).unlink()
    (folder / layout.SUMMARY).write_text(json.dumps({**SUMMARY, "environments": [CPU, {"torch": "3.0"}]}))
    assert Run(folder).environment() == {"torch": ["2.15.0", "3.0"], "device": ["CPU"]}


def test_the_members_of_a_group(group: Path) -> None:
    shutil.copytree(group / "seed0", group / "seed10")
    assert [(run.folder.name, run.state) for run in members(group)] == [
        ("seed0", "done"),
        ("seed1", "not begun"),
        ("seed10", "done"),
    ]


def test_outcomes_and_exit_codes() -> None:
    for code, word in ((errors.DONE, "done"), (errors.PREEMPTED, "preempted"), (errors.FAILED, "failed")):
        assert (errors.outcome_of(code), errors.code_of(word)) == (word, code)
    assert (errors.outcome_of(-9), errors.code_of("")) == ("failed", errors.FAILED)


# names


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    paths = [layout.checkpoint_path(tmp_path, step) for step in (5, 99_999_999, 100_000_000)]
    for path in (*paths, tmp_path / "step-last.pt", tmp_path / "step-00000007.pt.damaged", tmp_path / "other.pt"):
        path.touch()
    assert layout.checkpoints(tmp_path) == paths
    assert [layout.step_of(path) for path in paths] == [5, 99_999_999, 100_000_000]
    with pytest.raises(ValueError, match=r"step-last.pt: not the name of a checkpoint"):
        layout.step_of(tmp_path / "step-last.pt")
    assert layout.checkpoints(tmp_path / "nowhere") == []


def test_the_run_of_a_checkpoint(group: Path) -> None:
    (path,) = Run(group / "seed0").checkpoints.values()
    assert layout.run_of(path) == group / "seed0"
    assert layout.run_of(path.parent / "model.safetensors") == group / "seed0"
    assert layout.run_of(group / "seed0" / "export" / "model.safetensors") is None
    (group / "seed0" / layout.SETTINGS).unlink()
    assert layout.run_of(path) is None


# damaged files

COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "report": (
        ["report", "{group}", "--out", "{group}/page.html"],
        {layout.SETTINGS, layout.SUMMARY, layout.EVALUATION, layout.MEMBERS},
    ),
    "table": (["table", "{group}"], {layout.SETTINGS, layout.SUMMARY, layout.MEMBERS}),
    "diff": (["diff", "{intact}", "{run}"], {layout.SUMMARY}),
    "upload": (["upload", "{run}", "--offline"], {layout.SETTINGS, layout.SUMMARY, layout.EVALUATION}),
    "plots": (["plots", "{run}"], {layout.SETTINGS}),
    "export": (["export", "{run}", "--format", "safetensors"], {layout.SUMMARY, layout.EVALUATION}),
    "submit": (
        ["submit", "--local", "--preset", "digits", "--seeds", "0", "--run-dir", "{group}"],
        {layout.SETTINGS, layout.SUMMARY, layout.MEMBERS},
    ),
}
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda _: b"",
    "half written": lambda content: content[: max(content.rfind(b"="), content.rfind(b":"))],
    "not text": lambda _: b"\xff\xfe\x00\x01",
    "not JSON or TOML": lambda _: b"<html></html>",
    "no table": lambda _: b"[]",
    "nested": lambda _: b"x = " + b"[" * 100_000,
    "nested JSON": lambda _: b'{"a":' * 100_000,
    "foreign": lambda _: b'{"name": 1}',
    "a folder": lambda _: None,
}


def damage(path: Path, how: str) -> None:
    content = DAMAGE[how](path.read_bytes())
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(("name", "file"), [(name, file) for name in COMMANDS for file in sorted(COMMANDS[name][1])])
def test_a_damaged_file_is_one_sentence(
    group: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, file: str, how: str
) -> None:
    run = group / "seed0"
    path = (group if file == layout.MEMBERS else run) / file
    damage(path, how)
    job = submit.Job("1", run, run / "log", SimpleNamespace(done=lambda: True))  # type: ignore[arg-type]
    monkeypatch.setattr(submit, "_start", lambda _: [job])
    arguments = [each.format(group=group, run=run, intact=group.parent / "intact") for each in COMMANDS[name][0]]
    assert main(arguments) == errors.BAD_INPUT
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"dist_train: {path}")
    resumed = (name, file) == ("submit", layout.SETTINGS)  # read to continue it, not to show it
    assert sentence.endswith(", or name another --run-dir" if resumed else ", or omit this run")


@pytest.mark.parametrize("how", DAMAGE)
def test_a_run_whose_configuration_is_damaged_is_not_resumed(
    group: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path = group / "seed0" / layout.SETTINGS
    damage(path, how)
    assert train(["--preset", "digits", "--run-dir", str(path.parent)]) == errors.BAD_INPUT
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"dist_train: {path}")
    assert sentence.endswith(", or name another --run-dir")


@pytest.mark.parametrize(
    "line",
    [
        b"not JSON",
        b"[" * 100_000,
        b"{}",
        b'{"kind": "step", "step": 2}',
        b'{"kind": "step", "step": "2", "epoch": 1.0, "loss": 1.0}',
        b'{"kind": "step", "step": 2, "epoch": 1.0, "loss": [1.0]}',
        b'{"kind": "step", "step": 2, "epoch": 1.0, "loss": NaN}',
        b'{"kind": "eval", "step": 2, "epoch": 1, "test_accuracy": 93.0}',
        b'{"kind": "eval", "step": 2, "epoch": 1, "test_accuracy": 0.9, "coefficients": [[[0.5]]]}',
        b'{"kind": "weights", "step": 2, "digests": ["a"]}',
        b'{"kind": "other", "step": 2}',
    ],
)
@pytest.mark.parametrize("name", ["report", "plots", "diff", "upload"])
def test_a_damaged_line_of_the_metrics_is_one_sentence(
    group: Path, capsys: pytest.CaptureFixture[str], name: str, line: bytes
) -> None:
    run = group / "seed0"
    first, last = (run / layout.METRICS).read_bytes().splitlines()
    (run / layout.METRICS).write_bytes(b"\n".join([first, line, last, b""]))
    arguments = [each.format(group=group, run=run, intact=group.parent / "intact") for each in COMMANDS[name][0]]
    assert main(arguments) == errors.BAD_INPUT
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence == (
        f"dist_train: {run / layout.METRICS} is damaged, or of another version (line 2 of metrics.jsonl is not a line "
        f"of metrics); restore the original file, or omit this run"
    )


@pytest.mark.parametrize("line", [b"[" * 100_000, b"[]", b'{"event": 1}', b'{"event": "end", "step": "x"}'])
def test_damaged_lines_of_the_history_are_skipped(group: Path, line: bytes) -> None:
    """A kill may tear one, to which the next start adds its own."""
    path = group / "seed0" / layout.HISTORY
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert [row["event"] for row in Run(path.parent).history] == ["start", "end"]


@pytest.mark.parametrize("file", [layout.SETTINGS, layout.SUMMARY, layout.EVALUATION, layout.METRICS])
def test_a_damaged_run_of_a_group_is_named_and_the_others_are_shown(
    group: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    shutil.copytree(group / "seed0", group / "seed1")
    path = group / "seed1" / file
    path.write_bytes(b"[]\n[]\n")
    page = group / "page.html"
    assert main(["report", str(group), "--out", str(page)]) == errors.FAILED
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"dist_train: {path} is damaged, or of another version (")
    assert "seed1 (damaged)" in page.read_text()
    assert "90.00" in page.read_text()
    if file in (layout.SETTINGS, layout.SUMMARY):  # those that a table is made of
        assert main(["table", str(group)]) == errors.FAILED
        out, err = capsys.readouterr()
        assert err.splitlines() == [sentence]
        assert "90.00" in out
        assert "missing: seed1: damaged" in out


def test_the_commands_take_the_intact_run(group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are quick: what is damaged above is all that is wrong there."""
    for name in ("report", "table", "diff", "plots", "export"):
        arguments = [
            each.format(group=group, run=group / "seed0", intact=group.parent / "intact") for each in COMMANDS[name][0]
        ]
        assert main(arguments) == errors.DONE, capsys.readouterr().err
    assert capsys.readouterr().err == ""
    assert "90.00 %" in (group / "seed0" / "export" / "README.md").read_text()


def test_an_export_replaces_no_files_but_those_of_an_export(group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = group / "seed0", group / "site"
    out.mkdir()
    for folder, name in ((out, "README.md"), (run, "config.toml")):
        (folder / name).touch()
        before = (folder / name).read_bytes()
        assert main(["export", str(run), "--format", "safetensors", "--out", str(folder)]) == errors.BAD_INPUT
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence == f"dist_train: --out {folder}: holds {name}, which is not of an export; name another folder"
        assert (folder / name).read_bytes() == before


@pytest.mark.parametrize(
    ("file", "entry", "value", "words"),
    [
        (layout.SUMMARY, "test_accuracy", "high", "test_accuracy: "),
        (layout.SUMMARY, "device", None, "device: "),
        (layout.EVALUATION, "confusion", [[1]], "confusion is not 10x10"),
        (layout.EVALUATION, "classes", ["one"], "confusion is not 1x1"),
        (layout.EVALUATION, "coefficients", [], "coefficients: "),
        (
            layout.EVALUATION,
            "wrong",
            [{**EVALUATION["wrong"][0], "label": 10}],
            "wrong has an unknown class number",
        ),
    ],
)
def test_the_sentence_names_the_entry(group: Path, file: str, entry: str, value: Any, words: str) -> None:
    path = group / "seed0" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(UserError, match=rf"^{path} is damaged, or of another version \(.*{words}"):
        Run(group / "seed0").check()


def test_settings_of_another_version_are_named_and_the_rest_is_compared(
    group: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = group / "seed0" / layout.SETTINGS
    path.write_text(path.read_text() + "\n[later]\nsetting = 1\n")
    metrics = group / "seed0" / layout.METRICS
    metrics.write_text(metrics.read_text().replace("1.0", "1.5"))
    assert main(["diff", str(group / "seed0"), str(group.parent / "intact")]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert f"settings: not compared; {path} is damaged, or of another version (later: there is no such setting" in out
