"""Names of users, runs and classes are only names, whatever their characters are: on a terminal, in Markdown and in a
command to paste. The report's are tested in `reports/test_report.py`."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SUMMARY, command
from recorded import opened, train, whole_run
from test_structure import modules

from dist_train import config
from dist_train.__main__ import main
from dist_train.commands import evaluate, predict
from dist_train.errors import printable
from dist_train.reports import plots
from dist_train.reports.markdown import code, literal, table
from dist_train.tracking import worker

HOSTILE = "\x1b[31mred\x9b2J\nsecond | *line* \u202etxt.exe 数据\udcff"


def controls(text: str) -> list[str]:
    """The characters in it that a terminal would not show, but obey."""
    return [
        character
        for character in text
        if character != "\n"
        and (unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) == "RLO")
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("great white shark", "great white shark"),
        ("Müller 日本　è 👩\u200d🚀", "Müller 日本　è 👩\u200d🚀"),
        ("\x1b[31mred\x9b2J\x7f", r"\x1b[31mred\x9b2J\x7f"),
        ("a\nb\rc\td\u2028e", r"a\nb\rc\td\u2028e"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\udcff", r"\udcff"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected


def test_everything_is_printed_by_one_function() -> None:
    """`show`; but for JSON, which escapes by itself, and for texts of the project's own."""
    allowed = {"json.dumps", "usage", "__version__"}
    others = [
        f"{name}: print({ast.unparse(node.args[0])})"
        for name, path in modules().items()
        if name not in ("errors", "launch.install")  # the latter runs before the project is installed
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
        if ast.unparse(node.args[0]).partition("(")[0] not in allowed
    ]
    assert others == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run in a group, both with hostile names."""
    folder = tmp_path_factory.mktemp("runs") / HOSTILE / HOSTILE
    whole_run(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:  # those of another architecture
        row.pop("coefficients", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config.load("digits", None, [f"data.dataset={HOSTILE!r}".replace("\udcff", "")])
    (folder / "config.toml").write_text(config.to_toml(settings))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    shutil.copytree(folder, folder.parent / "second", ignore=shutil.ignore_patterns("summary.json"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["table", "{group}"], 0),
        (["diff", "{run}", "{group}/second"], 0),
        (["diff", "{run}", "{run}/nowhere"], 2),
        (["plots", "{run}"], 0),
        (["describe", "{run}", "--image-size", "32", "--classes", "3"], 0),
        (["describe", "{group}/second", "--picture", "{group}/a.svg", "--image-size", "32", "--classes", "3"], 0),
        (["describe", "{run}/nowhere"], 2),
        (["report", "{group}", "--out", "{group}/page.html"], 0),
        (["report", "{group}/nowhere"], 2),
        (["upload", "{group}/nowhere"], 2),
        ([HOSTILE], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_commands(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> None:
    done = main([argument.format(run=run, group=run.parent) for argument in arguments])
    said = capsys.readouterr()
    assert done == code, said.err
    assert said.out + said.err
    assert controls(said.out + said.err) == []
    if code == 2:
        assert said.err.count("\n") == 1


def test_tables_of_classes_stay_aligned() -> None:
    classes = [HOSTILE, "cat"]
    details = {
        "dataset": "mine",
        "split": "test",
        "images": 4,
        "step": 1,
        "accuracy": 0.5,
        "loss": 1.0,
        "calibration": {"ece": 0.0},
        "classes": classes,
        "confusion": [[1, 1], [1, 1]],
    }
    lines = [*evaluate.as_text(details)[-2:], *predict.as_text("a.png", [(name, 0.5) for name in classes], 80)[1:]]
    assert controls("".join(lines)) == []
    assert lines[0].index("50.00 %") == lines[1].index("50.00 %")
    assert lines[2].index("50.00 %") == lines[3].index("50.00 %")


def test_a_terminal_without_unicode(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "Müller" / "run")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = subprocess.run(command(folder, folder, module="dist_train diff"), capture_output=True, check=True)
    assert done.stdout.startswith(b"same")
    done = subprocess.run(command(folder / "no", module="dist_train report"), capture_output=True, check=False)
    assert rb"M\xfcller/run/no: there is no such folder" in done.stderr


def test_markdown_shows_names_as_they_are() -> None:
    assert literal("a|b *c* _d_ `e` <f> &amp; [g](h://i) $j$ k\n# l") == (
        r"a\|b \*c\* \_d\_ \`e\` \<f\> \&amp; \[g\](h\://i) \$j\$ k\\n\# l"
    )
    assert literal("www.a.org, St. Bernard's (2)") == r"www\.a.org, St. Bernard's (2)"
    assert table(["x"], [[literal("a|b")]]) == "| x |\n| --- |\n| a\\|b |\n"
    block = code("bash", "echo '\n```\n# no heading'")
    assert block.splitlines()[0] == "````bash"
    assert block.splitlines()[-1] == "````"


def test_the_table_of_a_group_has_hostile_values(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    group = shutil.copytree(run.parent, tmp_path / "group")
    settings = config.load("digits", None, ["data.dataset=a|<b>"])
    (group / "second" / "config.toml").write_text(config.to_toml(settings))
    assert main(["table", str(group)]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    cells = re.findall(r"(?<!\\)\|", header)
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows[:2]] == [len(cells)] * 2
    assert r"a\|\<b\>" in "\n".join(rows)


def test_commands_to_paste_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's; $HOME *"

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "draw", fail)
    (folder / "evaluation.json").mkdir(parents=True)
    recorder = opened(folder)
    train(recorder, 1, 4)
    recorder.evaluation(dict)
    recorder.finish({})
    recorder.close(0)
    first: Any = SimpleNamespace(run_dir=str(folder))
    said = [*capsys.readouterr().err.splitlines(), worker._where(SimpleNamespace(offline=True), first)]
    commands = [shlex.split(line[re.search("dist-train|wandb sync", line).start() :]) for line in said]  # type: ignore[union-attr]
    assert commands == [
        ["dist-train", "evaluate", str(folder), "--write"],
        ["dist-train", "plots", str(folder)],
        ["wandb", "sync", f"{folder}/wandb/offline-run-*"],
    ]
