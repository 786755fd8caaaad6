"""The pages: every link leads somewhere, and every command, setting, file and package that they name exists.

A command in a page is parsed by its own parser and not run. A kind of command that SHELL does not know fails: a new one
is added there on purpose.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_structure import FLOORS, WITHOUT_TORCH

from dist_train import config
from dist_train.commands import COMMANDS
from dist_train.config.arguments import parser as trainer_parser
from dist_train.config.settings import Block, Config, Convolution, Group, Smaller
from dist_train.errors import UserError
from dist_train.launch import submit

FOLDERS = ("launch", "slurm", "data_prep", "dist_train", "tests", "benchmarks")
PAGES = sorted([*REPOSITORY.glob("*.md"), *(path for name in FOLDERS for path in (REPOSITORY / name).glob("*.md"))])
# commented configurations, with commands in lines that begin with "#   "
COMMENTED = sorted(path for name in ("presets", "examples") for path in (REPOSITORY / "dist_train" / name).iterdir())
NOT_SETTINGS = {"a", "is_host", "key"}  # `a = FC(m)`; of torchrun's --rdzv-conf; `key=value`
FILES_OF_USERS = ("beton", "onnx", "pt2", "py", "safetensors", "sh", "toml")  # `model.onnx` is no setting
SBATCH = ("--array", "--nodes", "--time")  # options of sbatch that pages use

Words = list[str]


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


every_page = pytest.mark.parametrize("page", PAGES, ids=ids)


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def rows(page: Path, first: str) -> list[list[str]]:
    """The rows of the table whose header begins with the cell `first`."""
    found = re.search(rf"^\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    assert found, f"{page} has no table of {first}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


# Links


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 1
        while (unique := name if number == 1 else f"{name}-{number - 1}") in found:
            number += 1
        found.add(unique)
    return found


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_the_landing_page_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


# Commands


class Parsed(BaseException):
    """A command's parser has taken its arguments; `args[0]` is what it made of them."""


@contextmanager
def parsing_only(name: str, words: Words, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it is entered, sys.argv holds these words, and the first parser that has taken them raises Parsed."""
    depth = 0

    def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
        def parse(*args: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                found = method(*args, **options)
            finally:
                depth -= 1
            if depth:  # parse_args calls parse_known_args
                return found
            raise Parsed(found)

        return parse

    with patch.context() as patched:
        patched.setattr(sys, "argv", [name, *words])
        for method in ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, method, stopping(getattr(argparse.ArgumentParser, method)))
        yield


def parsed(main: Callable[[], object], name: str, words: Words, patch: pytest.MonkeyPatch) -> Any:
    """What the parser of a command makes of its words. The command goes no further."""
    with pytest.raises(Parsed) as stopped, parsing_only(name, words, patch):
        main()  # with bad arguments it returns, after it has said why on stderr
    return stopped.value.args[0]


@dataclass(frozen=True)
class Shell:
    """Checks the commands of one page. named: files that the page shows, by their names."""

    patch: pytest.MonkeyPatch
    named: dict[str, Path]

    def check(self, words: Words) -> str:
        """Check one command. Returns its name for the table of tests, "" for one that is not the project's. Raises
        UserError or AssertionError."""
        known = getattr(self, f"_{words[0].replace('-', '_')}", None)
        assert known, f"{words[0]}: a new kind of command; add it to Shell"
        name: str = known([word for word in words[1:] if word != "--help"])
        return name

    def trainer(self, words: Words) -> str:
        self._settings(trainer_parser().parse_intermixed_args(words))
        return ""

    def _settings(self, found: argparse.Namespace, preset: str | None = None) -> None:
        """Load the configuration that parsed arguments ask for."""
        file = getattr(found, "config", None)
        file = self.named.get(str(file), file)
        preset = preset or getattr(found, "preset", None) or (None if file else "block94")
        config.load(preset, file, found.settings)

    def _module(self, module: str, words: Words) -> str:
        """python -m MODULE, or the module of a dist-train command."""
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(REPOSITORY)
            main = importlib.import_module(module).main
        found = parsed(main, module, words, self.patch)
        rest: Words = []
        if isinstance(found, tuple):  # what the parser leaves is for the trainer
            found, rest = found
            self.trainer(rest)
        if hasattr(found, "settings"):
            what = getattr(found, "what", None)  # of describe
            if what is None or what in config.presets():
                self._settings(found, what)
            elif what in self.named:
                config.load(None, self.named[what], found.settings)
        if hasattr(found, "sweep"):
            for arguments in submit.members(rest, found.seeds, found.grid, found.sweep).values():
                self.trainer([*arguments])
        return f"python -m {module}"

    def _dist_train(self, words: Words) -> str:
        name, *rest = words
        assert name in COMMANDS, f"{name}: there is no such command"
        self._module(COMMANDS[name].module, rest)
        return f"dist-train {name}"

    def _python(self, words: Words) -> str:
        if words[0] == "-c":
            ast.parse(words[1])
            return ""
        assert words[0] == "-m", words
        module, rest = words[1], words[2:]
        if module == "pytest":
            assert all((REPOSITORY / word).exists() for word in rest if word.endswith(".py"))
            return "python -m pytest"
        if module == "dist_train":
            return self._dist_train(rest)
        assert module.partition(".")[0] in ("dist_train", "tests", "benchmarks"), f"{module} is none of ours"
        return self._module(f"{module}.__main__" if module == "dist_train.data_prep" else module, rest)

    def _torchrun(self, words: Words) -> str:
        from torch.distributed.run import get_args_parser

        found = parsed(lambda: get_args_parser().parse_args(), "torchrun", words, self.patch)
        assert found.module, "torchrun takes our modules, by -m"
        self._python(["-m", found.training_script, *found.training_script_args])
        return "torchrun"

    def _bash(self, words: Words) -> str:
        script, *rest = words
        path = REPOSITORY / script
        assert path.is_file(), f"there is no {script}"
        if script == "launch/quickstart.sh":
            self.trainer(rest[1:] if rest[:1] == ["--latest"] else rest)
        elif script == "launch/setup.sh":
            assert all(word in path.read_text() for word in rest)
        elif script == "tests/versions.sh":
            import versions

            pythons = {(3, minor): Path(f"python3.{minor}") for minor in range(10, 14)}
            self.patch.setattr(versions, "pythons", lambda: pythons)
            found = parsed(versions.main, script, rest, self.patch)
            assert {*found.environments} <= versions.environments([*pythons]).keys()
        else:
            assert script == "tests/run.sh", f"{script}: a new script; add it to Shell"
            sources = {path.stem: path.read_text() for path in REPOSITORY.glob("tests/**/test_*.py")}
            for word in rest[1::2]:
                assert rest[0] == "-k"
                tests = [*sources, *(name for text in sources.values() for name in re.findall(r"def (test_\w+)", text))]
                assert any(word in name for name in tests), f"-k {word} chooses no test"
        return f"bash {script}"

    def _sbatch(self, words: Words) -> str:
        place = next(number for number, word in enumerate(words) if not word.startswith("-"))
        for option in words[:place]:
            assert option.partition("=")[0] in SBATCH, f"{option}: a new option of sbatch; add it to SBATCH"
        assert words[place] == "slurm/train.sh"
        self.trainer(words[place + 1 :])
        return "sbatch"

    def _wandb(self, words: Words) -> str:
        assert words[0] in ("sweep", "agent")
        assert words[0] == "agent" or Path(words[1]).exists()
        return "wandb"

    def _pip(self, words: Words) -> str:
        extras = re.findall(r"^(\w+) = \[", Path("pyproject.toml").read_text(), re.MULTILINE)
        found = re.fullmatch(r"\.(?:\[(\w+)\])?", words[-1])
        assert words[0] == "install"
        assert found
        assert found[1] in (None, *extras)
        return ""

    def _ruff(self, words: Words) -> str:
        return "ruff"

    def _mypy(self, words: Words) -> str:
        return "mypy"

    def _nano(self, words: Words) -> str:
        assert Path(words[0]).is_file()
        return ""

    def _source(self, words: Words) -> str:
        assert words == [".venv/bin/activate"]
        return ""

    def _git(self, words: Words) -> str:
        assert words[0] == "clone"
        return ""

    def _cd(self, words: Words) -> str:
        return ""

    _tail = _export = _cd


def commands(text: str) -> Iterator[Words]:
    """The simple commands of a bash text, without the variables that are set for them; a loop is its first turn."""
    text = re.sub(r"(^|\s)#.*", r"\1", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: Words = []
    loop: dict[str, str] = {}
    for token in [*lexer, "\n"]:
        if not {*token} <= {*";&|\n"}:
            words.append(token)
            continue
        if words and words[0] == "for":
            loop, words = {f"${words[1]}": words[3]}, []
        while words and (words[0] in ("do", "done") or re.match(r"[A-Z][A-Z_0-9]*=", words[0])):
            words.pop(0)
        if words:
            for name, value in loop.items():
                words = [word.replace(name, value) for word in words]
            yield words
        words = []


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Shell]:
    """Makes the Shell of a page, in which its TOML blocks are files of the name in their first line."""
    monkeypatch.chdir(REPOSITORY)

    def made(page: Path) -> Shell:
        named = {}
        for text in blocks(page, "toml"):
            name = text.splitlines()[0].removeprefix("# ")
            named[name] = tmp_path / name
            named[name].write_text(text)
        return Shell(monkeypatch, named)

    return made


@every_page
def test_commands_are_what_their_parsers_take(page: Path, shell: Callable[[Path], Shell]) -> None:
    here, documented = shell(page), set()
    for block in blocks(page, "bash"):
        for words in commands(block):
            documented.add(here.check(words))
    run_by = {name for cells in table_of_tests() for name in cells[0]}
    assert documented - {""} <= run_by, "give them a row in tests/README.md"


@pytest.mark.parametrize("path", COMMENTED, ids=ids)
def test_commands_in_comments(path: Path, shell: Callable[[Path], Shell]) -> None:
    found = [*commands("\n".join(re.findall(r"^#   (\S.*)$", path.read_text(), re.MULTILINE)))]
    assert found
    for words in found:
        shell(path).check(words)


@every_page
def test_quoted_errors_are_those_of_the_trainer(page: Path, shell: Callable[[Path], Shell]) -> None:
    for block in blocks(page, "console"):
        command, said = block.rstrip("\n").split("\n", 1)
        ((_, name, *words),) = commands(command.removeprefix("$ "))
        assert name == "train"
        with pytest.raises(UserError) as refused:
            shell(page).trainer(words)
        assert said == f"dist_train: {refused.value}"


@every_page
def test_imported_names_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_an_unknown_command_is_noticed(shell: Callable[[Path], Shell]) -> None:
    here = shell(REPOSITORY / "README.md")
    for wrong in (
        "dist-train tarin",
        "dist-train train --prest block94",
        "dist-train train epohcs=3",
        "dist-train table",
        "python -m dist_train.report runs/one",
        "torchrun --nproc_per_node=2 -m dist_train.main epohcs=3",
        "torchrun --nprocs=2 -m dist_train.main",
        "bash launch/start.sh",
        "bash tests/run.sh -k no_such_test",
        "python -m tests.golden --all",
        "python -m benchmarks.speed --fast",
        "sbatch --nodes=2 slurm/train.sh --nodes 2",
        "conda install torch",
    ):
        ((*words,),) = commands(wrong)
        with pytest.raises((UserError, AssertionError, SystemExit, ImportError, pytest.fail.Exception)):
            here.check(words)


# Tables of commands


def table_of_tests() -> list[tuple[list[str], str]]:
    """tests/README.md's rows: commands, and what runs them."""
    return [(re.findall("`([^`]+)`", names), by) for names, by in rows(REPOSITORY / "tests" / "README.md", "command")]


def test_every_command_is_described() -> None:
    names = [cells[0] for cells in rows(REPOSITORY / "dist_train" / "README.md", "command")]
    assert names == [f"`dist-train {name}`" for name in COMMANDS]


def test_every_command_has_a_test() -> None:
    table = table_of_tests()
    names = [name for names, _ in table for name in names]
    assert len(names) == len({*names})
    assert {f"dist-train {name}" for name in COMMANDS} <= {*names}
    for names, by in table:
        if "test_" not in by or by.startswith("nobody"):
            continue
        (file,) = re.findall(r"`((?:\w+/)?test_\w+\.py)`", by)
        text = (REPOSITORY / "tests" / file).read_text()
        for name in names:
            last = name.split()[-1]
            wanted = {
                "dist-train": rf'dist_train(?: |", "){last}\b',
                "torchrun": "ranks=2",
                "bash": re.escape(last),
                "python": last.removeprefix("tests."),
            }
            assert re.search(wanted.get(name.split()[0], last), text), f"{file} does not run {name}"


# Settings, files, packages


def known_settings() -> set[str]:
    """Dotted names of all settings and sections."""

    def walk(tree: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, value in tree.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    return {*walk(config.to_dict(config.load("block94", None, [])), "")}


@every_page
def test_settings_exist(page: Path) -> None:
    within = {field.name for table in (Block, Convolution, Group, Smaller) for field in fields(table)}
    known, sections = known_settings(), {field.name for field in fields(Config)}
    wrong = []
    for span in spans(page):
        setting = re.fullmatch(r"([a-z_][a-z_0-9.]*) ?= ?(.+)", span)
        if setting and setting[1] not in NOT_SETTINGS | within:
            config.load("digits", None, [f"{setting[1]}={setting[2]}"])
        name = re.fullmatch(rf"({'|'.join(sections)})\.[a-z_0-9.]+", span)
        if name and span not in known and span.rpartition(".")[2] not in FILES_OF_USERS:
            wrong.append(span)
    assert wrong == []


@every_page
def test_files_exist(page: Path) -> None:
    named = [span for span in spans(page) if re.fullmatch(r"[\w./-]+\.(?:py|sh)|(?:tests|dist_train)/[\w/]+", span)]
    assert [name for name in named if not any((folder / name).exists() for folder in (page.parent, REPOSITORY))] == []


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "dist_train/README.md"])
def test_floors_are_those_of_the_code(name: str) -> None:
    found = {int(cells[0]): {*re.findall("`([^`]+)`", cells[1])} for cells in rows(REPOSITORY / name, "floor")}
    assert found == {number: {*names} for number, names in enumerate(FLOORS)}


def test_the_packages_without_torch() -> None:
    (sentence,) = re.findall(
        r"^(`errors`[^.]*?) do not import torch", prose(REPOSITORY / "dist_train" / "README.md"), re.M
    )
    assert {*re.findall("`([^`]+)`", sentence)} == {*WITHOUT_TORCH}
