"""One sweep's file, gone through by W&B's agent and by an array."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, environment, trainer
from wandb_server import ENTITY, Row, Server

from dist_train import config
from dist_train.config.arguments import parser, resolve
from dist_train.errors import UserError
from dist_train.launch import submit
from dist_train.reports import table

EXAMPLE = REPOSITORY / "dist_train" / "examples" / "sweep.yaml"


def written(tmp_path: Path, **changes: Any) -> Path:
    """The example with other top-level keys; those that are None are removed."""
    tree = {**yaml.safe_load(EXAMPLE.read_text()), **changes}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return path


def small(tmp_path: Path, digits: Path, **parameters: Any) -> Path:
    """The example on the digits, with other parameters."""
    words = {"block94": "digits", "data.holdout=5000": "data.holdout=200"}
    tree = yaml.safe_load(EXAMPLE.read_text())
    fixed = {"train.epochs": 0.5, "train.batch_size": 256, "train.precision": "fp32", "train.device": "cpu"}
    fixed["data.dir"] = str(digits)
    parameters = {**{key: {"value": value} for key, value in fixed.items()}, **parameters}
    return written(tmp_path, command=[words.get(word, word) for word in tree["command"]], parameters=parameters)


# without W&B


def test_members_of_the_example() -> None:
    tree = yaml.safe_load(EXAMPLE.read_text())
    found = submit.members(["train.epochs=4"], "", [], EXAMPLE)
    assert len(found) == len({*found}) == 18
    assert list(found)[:2] == ["lr0.12-label_smoothing0.1-seed0", "lr0.12-label_smoothing0.1-seed1"]
    differing = set()
    first = resolve(parser().parse_intermixed_args(found["lr0.12-label_smoothing0.1-seed0"]))[1]
    for arguments in found.values():
        preset, settings = resolve(parser().parse_intermixed_args(list(arguments)))
        assert (preset, settings.train.epochs, settings.data.holdout) == ("block94", 4, 5000)
        differing |= {*config.difference(first, settings)}
    assert differing == set(tree["parameters"])
    assert tree["metric"]["name"] == "eval/val_accuracy"


def test_members_of_a_file(tmp_path: Path) -> None:
    parameters = {
        "data.smaller": {"value": []},
        "optim.default.lr": {"values": ["1e-2", 0.02], "distribution": "categorical"},
        "train.compile": {"values": [True]},
    }
    found = submit.members(["seed=7"], "3-4", ["epochs=1,2"], written(tmp_path, parameters=parameters, project="mine"))
    assert list(found) == [
        f"lr{lr}-compileTrue-epochs{epochs}-seed{seed}"
        for lr in ("1e_2", "0.02")
        for epochs in (1, 2)
        for seed in (3, 4)
    ]
    name, settings = resolve(parser().parse_intermixed_args(found["lr1e_2-compileTrue-epochs2-seed3"]))
    assert (name, settings.record.project, settings.data.smaller) == ("block94", "mine", [])
    assert (settings.optim.default.lr, settings.train.compile) == (0.01, True)
    assert (settings.train.epochs, settings.train.seed) == (2, 3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "random"}, "method = random: an array is a grid; write grid, or .* wandb sweep and wandb agent"),
    ({"method": None}, "method = None: an array is a grid"),
    (
        {"parameters": {"lr": {"min": 0.1, "max": 1}}},
        r"parameters\.lr has max, min: write values: .*, or .* wandb agent",
    ),
    ({"parameters": {"lr": {"values": []}}}, r"parameters\.lr has values: write values"),
    ({"parameters": {"optim": {"parameters": {}}}}, r"parameters\.optim has parameters: write values"),
    ({"parameters": {"lr": 0.1}}, r"parameters\.lr has no values: write values"),
    ({"parameters": None}, "has no parameters; write them as"),
    ({"early_terminate": {"type": "hyperband"}}, "early_terminate: not supported by an array; remove it, or"),
    ({"command": None}, r"command = : it must start dist_train\.main, and end with \$\{args_no_hyphens\}"),
    ({"command": ["python", "-m", "${program}", "${args}"]}, "must .* end with"),
    ({"program": "other.py"}, r"command = .* other\.py .*: it must start dist_train\.main"),
    ({"command": ["dist_train.main", "${envvar:X}", "${args_no_hyphens}"]}, "envvar:X} is not supported by an array"),
    ({"parameters": {"train.seed": {"values": [1, 1]}}}, "two members would be called seed1"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_a_file_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        submit.members([], "", [], written(tmp_path, **changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "sentence"), [("a: [1", "not valid YAML"), ("word", "has no parameters")])
def test_what_is_no_sweep_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        submit.members([], "", [], tmp_path / "sweep.yaml")
    with pytest.raises(UserError, match="no: cannot be read"):
        submit.members([], "", [], tmp_path / "no")


def test_a_setting_is_varied_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a setting has two values in it"):
        submit.members([], "0-1", [], EXAMPLE)


def test_dry_run_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["submit", "--local", "--dry-run", "--sweep", str(EXAMPLE), "--run-dir", "here"])
    assert submit.main() == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 18
    assert shown[-1] == (
        "dist_train.main --preset block94 data.holdout=5000 record.project=dist_train --run-dir here "
        "optim.kernels.lr=0.48 train.label_smoothing=0.2 train.seed=2 --run-dir here/lr0.48-label_smoothing0.2-seed2"
    )
    path = written(tmp_path, method="bayes")
    monkeypatch.setattr(sys, "argv", ["submit", "--local", "--sweep", str(path)])
    assert submit.main() == 2
    out, told = capsys.readouterr()
    assert (out, told.count("\n")) == ("", 1)
    assert told.startswith(f"dist_train: --sweep {path}: method = bayes")


def test_an_array_on_this_machine(tmp_path: Path, digits: Path) -> None:
    path = small(tmp_path, digits, **{"optim.default.lr": {"values": [0.01, 0.02]}})
    arguments = ["--local", "--at-most", "2", "--sweep", path, "record.wandb=disabled", "--run-dir", tmp_path / "group"]
    done = trainer(*arguments, module="dist_train submit", timeout=180)
    assert done.returncode == 0, done.stderr
    assert sorted(found.parent.name for found in tmp_path.glob("group/*/summary.json")) == ["lr0.01", "lr0.02"]
    assert done.stdout.endswith((tmp_path / "group" / "table.md").read_text())
    for lr in (0.01, 0.02):
        settings = config.load(None, tmp_path / "group" / f"lr{lr}" / "config.toml", [])
        assert (settings.optim.default.lr, settings.data.holdout, settings.train.epochs) == (lr, 200, 0.5)


# with W&B


class Sweeps(Server):
    """A server that goes through the grid of one sweep. tree: its file. members: by run the settings it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.tree: Row = {}
        self.members: dict[str, Row] = {}
        self._left: list[Row] = []

    def answered(self, operation: str, variables: Row) -> Row | None:
        if operation == "UpsertSweep":
            self.tree = yaml.safe_load(variables["config"])
            values = [given.get("values") or [given["value"]] for given in self.tree["parameters"].values()]
            self._left = [
                dict(zip(self.tree["parameters"], chosen, strict=True)) for chosen in itertools.product(*values)
            ]
            project = {"id": "project", "name": variables["projectName"], "entity": ENTITY}
            return {"upsertSweep": {"sweep": {"name": "abc123", "project": project}, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            sweep = {"id": "sweep", "name": "abc123", "state": "RUNNING", "config": yaml.safe_dump(self.tree)}
            return {"project": {"sweep": {**sweep, "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            commands = [] if json.loads(variables["runState"]) else [self._next()]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        return super().answered(operation, variables)

    def _next(self) -> Row:
        """What the agent shall do."""
        if not self._left:
            return {"type": "exit"}
        run, given = f"member{len(self.members)}", self._left.pop(0)
        self.members[run] = given
        args = {key: {"value": value} for key, value in given.items()}
        return {"type": "run", "run_id": run, "program": self.tree["program"], "args": args}


# The command line of W&B, with an agent that looks every half second instead of every five.
WANDB = """
from wandb import wandb_agent
from wandb.cli.cli import cli
wandb_agent.Agent.POLL_INTERVAL = 0.5
cli()
"""


def wandb(server: Server, folder: Path, *arguments: object) -> str:
    """Run a command of W&B in a folder, logged in at the server, and return its output."""
    variables = {
        "HOME": str(folder),
        "NETRC": str(folder / "netrc"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_API_KEY": "x" * 40,
        "WANDB_BASE_URL": server.url,
    }
    done = subprocess.run(
        [sys.executable, "-c", WANDB, *map(str, arguments)],
        cwd=folder,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_example_is_a_sweep(tmp_path: Path) -> None:
    with (server := Sweeps()):
        told = wandb(server, tmp_path, "sweep", EXAMPLE)
    assert "wandb agent somebody/dist_train/abc123" in told
    assert server.tree == yaml.safe_load(EXAMPLE.read_text())


def test_an_agent_trains_the_members(tmp_path: Path, digits: Path) -> None:
    """Also when their weights depend on the same settings: each has a run and a run folder of its own."""
    path = small(tmp_path, digits, **{"train.timeout": {"values": [300, 301]}, "optim.default.lr": {"value": 0.02}})
    with (server := Sweeps()):
        wandb(server, tmp_path, "sweep", path)
        told = wandb(server, tmp_path, "agent", "somebody/dist_train/abc123")
    assert [given["train.timeout"] for given in server.members.values()] == [300, 301]
    assert server.runs.keys() == server.members.keys(), told
    group = tmp_path / "runs" / "sweep-abc123"
    folders = {(folder / "wandb" / "run_id").read_text(): folder for folder in group.iterdir()}
    assert folders.keys() == server.members.keys()
    for name, given in server.members.items():
        run = server.runs[name]
        assert (run.exit_code, run.project, run.attributes["sweep"]) == (0, "dist_train", "abc123")
        assert run.attributes["displayName"] == folders[name].name
        assert {key: run.config[key]["value"] for key in given} == given
        shown = run.config["train"]["value"], run.config["optim"]["value"]["default"]
        assert (shown[0]["timeout"], shown[1]["lr"]) == (given["train.timeout"], 0.02)
        settings = config.load(None, folders[name] / "config.toml", [])
        assert (settings.train.timeout, settings.optim.default.lr) == (given["train.timeout"], 0.02)
        assert server.tree["metric"]["name"] in run.summary()
    assert "missing" not in table.write(group)[0]
