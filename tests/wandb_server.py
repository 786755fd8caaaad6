"""A W&B server for tests, as far as the real SDK needs one: runs, their files and artifacts, resuming, and faults.

`runs[id]` has the data that a run sent. `answered` answers GraphQL operations; extend it for tests that need more. The
module also reads W&B's offline files, and computes the rows that W&B should have for a run folder.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ENTITY = {"id": "entity", "name": "somebody"}
DIGITS = [
    ["conv1_3x3", "conv2_1x1"],
    ["conv1_3x3", "conv2_3x3_d2", "conv3_1x1"],
]  # the convolutions of the preset `digits`


@dataclass
class Run:
    """The data of a run. lines: of the streamed files, by name and number. uploads: complete files."""

    name: str  # the run's id, which W&B's API calls its name
    project: str = ""
    entity: str = ENTITY["name"]
    attributes: Row = field(default_factory=dict)  # displayName, groupName, tags, sweep, state, ...
    config: Row = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False

    def rows(self, name: str) -> list[Row]:
        """The rows of a streamed file."""
        lines = self.lines.get(name, {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def history(self) -> list[Row]:
        """The logged rows, without the keys that W&B adds."""
        return [own(row) for row in self.rows("wandb-history.jsonl")]

    def summary(self) -> Row:
        return (self.rows("wandb-summary.json") or [{}])[-1]

    def metrics(self) -> dict[str, str]:
        """The horizontal axis of each metric, or pattern of metrics, that has one; from the run's config."""
        found = self.config["_wandb"]["value"]["m"]
        # keys of W&B's short form: 1 name, 2 pattern, 4 name of the axis, 5 number of the axis in this list
        return {
            str(metric.get("1") or metric.get("2")): metric.get("4") or found[metric["5"] - 1]["1"]
            for metric in found
            if "4" in metric or "5" in metric
        }


def own(row: Row) -> Row:
    """A row without the keys that W&B adds."""
    return {key: value for key, value in row.items() if not key.startswith("_")}


def distinct(rows: list[Row]) -> list[Row]:
    """The rows without repeated ones, as in a chart."""
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def offline_records(run_dir: Path, number: int = 0) -> list[Row]:
    """The records of a run's offline file, read by W&B's own tool. number: of the run's starts."""
    folder = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))[number].parent
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def offline_rows(run_dir: Path, number: int = 0) -> list[Row]:
    """The logged rows of a run's offline file."""
    records = offline_records(run_dir, number)
    return [own(record["history"]["item"]) for record in records if record["type"] == "history"]


def expected_rows(run_dir: Path, branches: list[list[str]] = DIGITS, matrix_rate: float = 0) -> list[Row]:
    """The rows that W&B should have for a `metrics.jsonl`. matrix_rate: FLOP/s for the MFU; 0 for rows without it."""
    rows = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found: Row = {}
        if row["kind"] == "step":
            found["train/accuracy"] = row["correct"] / row["images"]
            if matrix_rate:
                found["train/mfu"] = row["flops"] / row["images"] * row["images_per_second"] / matrix_rate
            for key in ("epoch", "loss", "lr", "grad_norm", "images_per_second"):
                found[f"train/{key}"] = row[key]
        elif row["kind"] == "eval":
            found["epoch"] = row["epoch"]
            for key in [key for key in row if key.endswith(("_loss", "_accuracy", "_tta"))]:
                found[f"eval/{key}"] = row[key]
            for block, names in enumerate(branches):
                for name, (mean, std) in zip(names, row["coefficients"][block], strict=True):
                    found[f"mixing/block{block + 1}/{name}_mean"] = mean
                    found[f"mixing/block{block + 1}/{name}_std"] = std
        if found:
            rows.append({"step": row["step"], **found})
    return rows


class Server:
    """`with Server() as server:` runs the server in a thread at `server.url`; `stop` and `start` interrupt its service.

    delay: seconds that each answer takes. refused: a function from an operation or path to an HTTP status that is the
    answer instead; None for requests that are served.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Row] = []  # type, name, aliases, files (by path), committed
        self.asked: list[str] = []  # operations and paths
        self.delay = 0.0
        self.refused: Callable[[str], int | None] = lambda _: None
        self._port = 0
        self._http: _Http | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start to listen; after a `stop` at the same port."""
        self._http = _Http(self._port, self)
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop to answer, also on open connections."""
        if self._http is not None:
            self._http.silent = True
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def run(self, name: str) -> Run:
        return self.runs.setdefault(name, Run(name))

    def only(self) -> Run:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def answered(self, operation: str, variables: Row) -> Row | None:
        """The data that answer a GraphQL operation; None for an unknown one."""
        known = {
            "Viewer": self._viewer,
            "UpsertBucket": self._upsert_bucket,
            "RunResumeStatus": self._run_resume_status,
            "CreateRunFiles": self._create_run_files,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_artifact_manifest,
            "UpdateArtifactManifest": self._update_artifact_manifest,
            "CreateArtifactFiles": self._create_artifact_files,
            "CommitArtifact": self._commit_artifact,
            "ClientIDMapping": self._client_idmapping,
        }
        return known[operation](variables) if operation in known else None

    def _viewer(self, _: Row) -> Row:
        user = {**ENTITY, "entity": "somebody", "username": "somebody", "email": "", "flags": "{}"}
        return {"viewer": {**user, "teams": {"edges": []}}}

    def _upsert_bucket(self, variables: Row) -> Row:
        new = variables["name"] not in self.runs
        run = self.run(variables["name"])
        run.config.update(json.loads(variables.get("config") or "{}"))
        run.project = variables.get("project") or run.project
        run.entity = variables.get("entity") or run.entity
        run.attributes.update({key: value for key, value in variables.items() if value is not None})
        return {"upsertBucket": {"inserted": new, "bucket": self._bucket(run)}}

    def _run_resume_status(self, variables: Row) -> Row:
        run = self.runs.get(variables["name"])
        project = {"id": "project", "name": variables["project"], "entity": ENTITY}
        if run is None:
            return {"model": {**project, "bucket": None}}
        counts = {
            f"{kind}LineCount": len(run.lines.get(name, {}))
            for kind, name in (
                ("log", "output.log"),
                ("history", "wandb-history.jsonl"),
                ("events", "wandb-events.jsonl"),
            )
        }
        last = [json.dumps(row) for row in run.rows("wandb-history.jsonl")[-1:]]
        tails = {"historyTail": json.dumps(last), "eventsTail": "[]", "summaryMetrics": json.dumps(run.summary())}
        others = {"tags": run.attributes.get("tags") or [], "notes": None, "wandbConfig": '{"t": 1}'}
        return {"model": {**project, "bucket": {**self._bucket(run), **counts, **tails, **others}}}

    def _create_run_files(self, variables: Row) -> Row:
        files = [{"name": name, "uploadUrl": f"{self.url}/up/{variables['run']}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _create_artifact(self, variables: Row) -> Row:
        given = variables["input"]
        names = [alias["alias"] for alias in given.get("aliases") or []]
        collection = (given.get("artifactCollectionNames") or [given.get("artifactCollectionName")])[0]
        self.artifacts.append(
            {
                "type": given["artifactTypeName"],
                "name": collection,
                "run": given.get("runName"),
                "aliases": names,
                "client": given.get("clientID"),
                "files": {},
                "committed": False,
            }
        )
        made = {"id": str(len(self.artifacts) - 1), "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def _create_artifact_manifest(self, variables: Row) -> Row:
        return self._manifest("createArtifactManifest", variables["artifactID"])

    def _update_artifact_manifest(self, variables: Row) -> Row:
        return self._manifest("updateArtifactManifest", variables["artifactManifestID"])

    def _manifest(self, operation: str, number: str) -> Row:
        file = {"id": "file", "uploadUrl": f"{self.url}/manifest/{number}", "uploadHeaders": []}
        return {operation: {"artifactManifest": {"id": number, "file": file}}}

    def _create_artifact_files(self, variables: Row) -> Row:
        edges = []
        for file in variables.get("input", variables)["artifactFiles"]:
            url = f"{self.url}/artifact/{file['artifactID']}/{file['name']}"
            node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": {**node, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, variables: Row) -> Row:
        self.artifacts[int(variables["artifactID"])]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}

    def _client_idmapping(self, variables: Row) -> Row:
        clients = [artifact["client"] for artifact in self.artifacts]
        return {"clientIDMapping": {"serverID": str(clients.index(variables["clientID"]))}}

    def _bucket(self, run: Run) -> Row:
        return {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.attributes.get("displayName") or run.name,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": run.attributes.get("sweep"),
            "historyLineCount": len(run.lines.get("wandb-history.jsonl", {})),
            "project": {"id": "project", "name": run.project, "entity": {**ENTITY, "name": run.entity}},
        }

    def streamed(self, name: str, body: Row) -> None:
        """Store streamed data of a run: rows, the summary, the end."""
        run = self.run(name)
        for file, part in (body.get("files") or {}).items():
            run.lines.setdefault(file, {}).update(enumerate(part["content"], part["offset"]))
        run.preempting = body.get("preempting", run.preempting)
        if body.get("complete"):
            run.exit_code = body["exitcode"]

    def uploaded(self, path: str, content: bytes) -> None:
        """Store an uploaded file."""
        kind, number, file = (*path.strip("/").split("/", 2), "")[:3]
        if kind == "up":
            self.run(number).uploads[file] = content
        elif kind == "artifact":
            self.artifacts[int(number)]["files"][file] = content


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    silent = False

    def __init__(self, port: int, server: Server) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.owner = server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: W&B's client closes idle connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, *_: Any) -> None:
        """Print nothing, instead of a line on stderr for each request."""

    def do_PUT(self) -> None:
        body = self.body()
        if self.passes(self.path):
            with self.server.owner.lock:
                self.server.owner.uploaded(self.path, body)
            self.reply({})

    def do_POST(self) -> None:
        server, body = self.server.owner, json.loads(self.body())
        if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            if self.passes(self.path):
                with server.lock:
                    server.streamed(stream[1], body)
                self.reply({})
        elif self.path == "/graphql":
            named = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            assert named
            if self.passes(named[1]):
                with server.lock:
                    data = server.answered(named[1], body.get("variables") or {})
                self.reply({"data": data} if data else {"errors": [{"message": f"{named[1]} is not known here"}]})
        elif self.passes(self.path):
            self.reply({}, 404)

    def body(self) -> bytes:
        length = self.headers.get("Content-Length")
        content = self.rfile.read(int(length)) if length else b"".join(iter(self.chunk, b""))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def passes(self, what: str) -> bool:
        """Whether to serve a request: not if it is refused, or the server was stopped."""
        server = self.server.owner
        server.asked.append(what)
        time.sleep(server.delay)
        if self.server.silent:
            self.close_connection = True
            return False
        if status := server.refused(what):
            self.reply({"errors": [{"message": "refused"}]}, status)
        return not status

    def reply(self, answer: Row, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
