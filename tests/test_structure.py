"""The structure of the code: who may import whom, and what comes without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

from dist_train.runs import layout

# The floors of the house, from the ground up. A module may import modules of its own package and of lower floors: no
# module of a higher floor, and none of another package on its own. CONTRIBUTING.md states the rule.
FLOORS = (
    ("errors",),
    ("command_line", "randomness", "signals"),
    ("data_prep",),
    ("files",),
    ("config",),
    ("model", "distributed", "runs"),
    ("data", "tracking", "reports"),
    ("training", "inference"),
    ("main", "commands"),
    ("launch",),
    ("__main__",),
)
# Packages that need no torch, and the modules of others that need none: importing all of them imports no torch.
WITHOUT_TORCH = (
    *("errors", "command_line", "signals", "data_prep", "files"),
    *("config", "tracking", "reports"),
)
WITHOUT_TORCH_TOO = (
    *("main", "data.dataset", "model.shapes", "training.recorder", "training.progress"),
    *("runs.layout", "runs.contents", "runs.metrics", "runs.history", "runs.run"),
    *("launch.node", "launch.cluster", "launch.submit", "launch.quickstart"),
)
# The only modules that import others of ours inside a function: after the checks that need no torch, or for a command
# of many. Each says why at the place.
LATE = ("__init__", "__main__", "main", "reports.diff")

PACKAGE = REPOSITORY / "dist_train"


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name without `dist_train.`."""
    found = {}
    for folder in (PACKAGE, *(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())):
        for path in folder.glob("*.py"):
            name = path.stem if folder == PACKAGE else f"{folder.name}.{path.stem}"
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> list[tuple[str, bool]]:
    """The modules of ours that a file imports anywhere in it, and whether that is inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("dist_train."):
                found.append((_module(name.removeprefix("dist_train.")), id(node) in inside))
    return found


def _module(name: str) -> str:
    """The module that an imported name is, or is in; "" for what the package itself has."""
    there = modules()
    while name and name not in there:
        name = name.rpartition(".")[0]
    return name


def package(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if package(module) in names)


def test_every_module_has_a_floor() -> None:
    known = {name for names in FLOORS for name in names} | {"__init__"}
    assert {package(name) for name in modules()} == known


def test_nothing_imports_upwards() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name != "__init__"
        for other, _ in imports(path)
        if other and package(other) != package(name) and floor(other) >= floor(name)
    ]
    assert wrong == []


def test_there_is_no_circle() -> None:
    graph = {name: {other for other, _ in imports(path) if other != name} for name, path in modules().items()}
    # the facade of a package imports its modules, and they import each other
    graph = {name: others - {package(name)} for name, others in graph.items()}
    graph.pop("__init__")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_imports_stand_at_the_top() -> None:
    late = {name for name, path in modules().items() for other, inside in imports(path) if inside and other}
    assert late <= {*LATE}


def test_names_of_a_run_folder_stand_in_its_layout() -> None:
    """But for the configuration's, which lies below; and W&B has names of its own for the versions of an artifact."""
    names = {value for key, value in vars(layout).items() if key.isupper() and isinstance(value, str) and "." in value}
    names |= {layout.CHECKPOINTS, ".sha256", ".damaged"}
    literal = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if package(module) != "data_prep"  # which has files of its own
        and isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (node.value in names or node.value.startswith("step-"))
    }
    assert literal <= {"runs.layout", "config.loading", "tracking.worker"}


def test_ranks_wait_for_each_other_in_one_place() -> None:
    """Where the host's wait for a collective operation counts as waiting for peers."""
    users = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) and any(alias.name == "torch.distributed" for alias in node.names)
    }
    assert users == {"distributed.ranks", "distributed.gradient_sum"}


def test_configuration_reports_tracking_and_readers_need_no_torch() -> None:
    chosen = [name for name in modules() if package(name) in WITHOUT_TORCH and not name.endswith("__main__")]
    names = [f"dist_train.{name}" for name in (*chosen, *WITHOUT_TORCH_TOO)]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_text_is_utf8_in_every_locale() -> None:
    """Every file that is opened as text, and all text from other programs, has an encoding."""
    sources = [
        path
        for name in ("dist_train", "launch", "data_prep", "benchmarks")
        for path in REPOSITORY.glob(f"{name}/**/*.py")
    ]
    assert len(sources) > 90
    missing = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            modes = [value.value for value in [*node.args, *options.values()] if isinstance(value, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            opens = name == "open" and not binary and ast.unparse(node.func) not in ("os.open", "Image.open")
            reads = name in ("read_text", "write_text", "NamedTemporaryFile", "fdopen") and not binary
            if (opens or reads or {"text", "universal_newlines"} & options.keys()) and "encoding" not in options:
                missing.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {ast.unparse(node)}")
    assert missing == []
