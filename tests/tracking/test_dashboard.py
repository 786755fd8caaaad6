"""The W&B workspace: its panels against what a real run logs, and saving it with the real SDK."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import REPOSITORY, command, environment, trainer
from wandb_server import Row, Server, offline_records

from dist_train.tracking import dashboard
from dist_train.training import system_metrics

# the library's own
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

ABSENT = "gpu"  # what is drawn of GPUs is not to be had on every machine


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(), "NETRC": "/nowhere", **variables}
    return forked.run(command(*arguments, module="dist_train dashboard"), REPOSITORY, env)


def defined(**given: Any) -> Row:
    """The definition, as W&B gets it."""
    view: Row = dashboard.workspace("mine", **given)._to_model().model_dump(by_alias=True, exclude_none=True)
    return view


def panels(view: Row) -> list[Row]:
    return [panel for section in view["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def under(tree: Any, key: str) -> list[Any]:
    """All that a tree has under a key, at any depth."""
    if isinstance(tree, list):
        return [found for item in tree for found in under(item, key)]
    if not isinstance(tree, dict):
        return []
    return [*([tree[key]] if key in tree else []), *(found for value in tree.values() for found in under(value, key))]


@pytest.fixture(scope="module")
def records(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """By kind the records of an offline run that logs all there is."""
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    settings = ["train.epochs=1", "batch_size=512", "train.device=cpu", f"data.dir={digits}", "data.holdout=200"]
    settings += ["precision=fp32", "evaluate.tta=mirror", "record.wandb=offline", "record.system=all"]
    done = trainer("--preset", "digits", *settings, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Row]] = {}
    for record in offline_records(folder):
        found.setdefault(record["type"], []).append(record.get(record["type"], {}))
    return found


def test_every_metric_of_a_panel_is_logged(records: dict[str, list[Row]]) -> None:
    rows = [row["item"] for row in records["history"]]
    logged = {key for row in rows for key in row} | {f"system/{key}" for row in records["stats"] for key in row["item"]}
    summary = logged | {key for row in records["summary"] for key in row["update"]}
    axes = {metric["glob_name"]: metric["step_metric"] for metric in records["metric"] if "glob_name" in metric}
    config = records["run"][0]["config"]["update"]
    view = defined(blocks=2)
    drawn: set[str] = set()
    for panel in panels(view):
        settings, kind = panel["config"], panel["viewType"]
        if kind == "Run History Line Plot":
            matching = {key for key in logged if re.search(settings.get("metricRegex", "^$"), key)}
            named = {key for key in settings["metrics"] if ABSENT not in key}
            assert named <= logged
            if not named | matching:
                assert ABSENT in str(settings)
                (sampled,) = re.findall(r"^\^ranks/(\w+)/", settings.get("metricRegex", "")) or [""]
                assert sampled in inspect.getsource(system_metrics)
            for key in named | matching:
                axis = "_runtime" if key.startswith("system/") else axes[f"{key.partition('/')[0]}/*"]
                assert settings["xAxis"] == axis
            drawn |= named | matching
        elif kind == "Bar Chart":
            assert {*settings["metrics"]} <= summary
    columns = [*under(view, "accessor"), *view["spec"]["section"]["runSets"][0]["runFeed"]["columnOrder"]]
    columns += [
        panel["config"][axis]
        for panel in panels(view)
        for axis in ("xAxis", "yAxis")
        if panel["viewType"] == "Scatter Plot"
    ]
    for column in columns:
        section, _, path = column.partition(":")
        if section == "summary":
            assert path in summary
        elif section == "config":
            node: Any = config
            top, _, rest = path.partition(".value.")
            for part in (top, *rest.split(".")):
                node = node[part]
        else:
            assert column == "run:displayName"
    assert {*under(view, "targetKey")} <= summary
    for key in [name for names in under(view, "mediaKeys") for name in names]:
        assert f"{key}.path" in logged
    tables = {key.removesuffix("._type") for row in rows for key, value in row.items() if value == "table-file"}
    shown = json.dumps(view)
    assert all(f'"{table}"' in shown for table in tables)
    # and the other way round: what is logged is drawn
    numbers = {key for key in logged if key.startswith(("train/", "eval/", "mixing/", "ranks/"))}
    assert {key for key in numbers - drawn if not key.endswith("_tta")} == {"train/epoch"}


def test_chart_queries_are_those_of_the_sdk(records: dict[str, list[Row]]) -> None:
    logged = {key: value for row in records["config"] for key, value in row["update"].items()}
    own = {key.rpartition(".")[2]: value["panel_config"] for key, value in logged.items() if ".visualize." in key}
    mine = {}
    for panel in panels(defined()):
        if panel["viewType"] == "Vega2":
            (runs,) = panel["config"]["userQuery"]["queryFields"]
            (all_runs, _) = runs["args"]  # the second is how many at most
            runs["args"] = [all_runs]
            (table,) = [arg["value"] for arg in runs["fields"][-1]["args"]]
            mine[table.removesuffix("_table")] = panel["config"]
    assert mine.keys() == own.keys()
    for key, config in mine.items():
        own[key]["fieldSettings"] = {name: value for name, value in own[key]["fieldSettings"].items() if value}
        title = config["stringSettings"].pop("title")
        assert own[key]["stringSettings"].pop("title").startswith(f"{title} (")
        assert config == own[key]


class Views(Server):
    """A server that keeps workspaces."""

    def __init__(self) -> None:
        super().__init__()
        self.views: dict[str, Row] = {}
        self.saved: list[Row] = []

    def answered(self, operation: str, variables: Row) -> Row | None:
        if operation == "GetDefaultEntity":
            return super().answered("Viewer", variables)
        if operation == "View":
            found = self.views.get(variables["viewName"])
            return {"project": {"allViews": {"edges": [{"node": found}] if found else []}}}
        if operation == "UpsertView2":
            self.saved.append(variables)
            view = {"id": f"id-{variables['name']}", "name": variables["name"]}
            self.views[variables["name"]] = {**view, "displayName": variables["displayName"], "spec": variables["spec"]}
            return {"upsertView": {"view": view, "inserted": "id" not in variables}}
        return super().answered(operation, variables)


def test_saving(tmp_path: Path) -> None:
    with (server := Views()):
        account = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "x" * 40, "HOME": str(tmp_path)}
        first = run("--project", "mine", **account)
        assert (first.returncode, first.stderr) == (0, "")
        assert re.fullmatch(rf"{server.url}/somebody/mine\?nw=\w+\n", first.stdout)
        again = run("--project", "mine", "--blocks", "9", **account)
        assert again.stdout == first.stdout
        other = run("--project", "mine", "--entity", "team", "--name", "Other", **account)
        assert other.stdout.startswith(f"{server.url}/team/mine?nw=")
        assert len(server.views) == 2
        one, two, three = server.saved
        assert json.loads(one["spec"]) == defined()["spec"]
        assert json.loads(two["spec"]) == defined(blocks=9)["spec"]
        assert ("id" not in one, two["id"], two["name"]) == (True, f"id-{one['name']}", one["name"])
        assert (one["entityName"], one["projectName"], one["displayName"]) == ("somebody", "mine", dashboard.NAME)
        assert (three["entityName"], three["displayName"]) == ("team", "Other")
        server.refused = lambda what: 403 if what == "UpsertView2" else None
        refused = run("--project", "mine", **account)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"dist_train: {server.url} did not accept a workspace for project somebody/mine (")


def test_a_name_that_is_not_taken() -> None:
    done = run("--json", "--name", "\N{GRINNING FACE}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "dist_train: --name \N{GRINNING FACE}: W&B accepts no emoji in names; write it in plain"
    )
    assert done.stderr.count("\n") == 1


def test_not_logged_in(tmp_path: Path) -> None:
    done = run(WANDB_BASE_URL="http://127.0.0.1:1", HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "dist_train: not logged in at http://127.0.0.1:1; run wandb login, or print the definition with --json\n"
    )


def test_the_definition_needs_no_server(tmp_path: Path) -> None:
    done = run("--json", "--project", "mine", WANDB_BASE_URL="http://127.0.0.1:1", HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == defined()
    names = [section["name"] for section in defined()["spec"]["section"]["panelBankConfig"]["sections"]]
    assert names[:2] == ["Loss and accuracy", "Speed and optimisation"]
    assert len(panels(defined(blocks=9))) == len(panels(defined())) + 3
