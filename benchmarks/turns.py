"""Several programs on one machine, of which one at a time may compute: each reports the time of its turns.

A program may have several processes (ranks), which all take the same turns; a turn lasts until the slowest is done.
They are connected to the process that gives the turns by a Unix socket, one JSON object a line: `ready` before a turn,
its report after it, `done` instead of another one.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class EnoughError(BaseException):
    """A program has run all the steps that were asked for. Not an Exception, so that no handler takes it for a
    failure."""


class Pacer:
    """The side of a program: asks for turns, and reports their time."""

    def __init__(self, address: str, name: str, device: str, turn: int = 1) -> None:
        """device: `cpu` or `cuda`, which must be idle at both ends of a turn. turn: the largest number of steps in a
        turn."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        self.lines, self.name, self.turn = connection.makefile("rw"), name, turn
        self.wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.label: str | None = None
        self.taken, self.clock = 0, Clock(self.wait)

    def plan(self, steps: dict[str, int], turns: int, flops: int = 0) -> None:
        """Send the plan. steps: of each kind in a whole run. turns: the approximate number of turns to be taken. flops:
        operations of a whole run, 0 where not known."""
        self._send({"name": self.name, "steps": steps, "turns": turns, "flops": flops})

    def step(self, label: str | None) -> None:
        """Begin a step of this kind, which ends where the next one begins or at `close`. None: not counted."""
        if self.taken and (label != self.label or self.taken == self.turn):
            self.close()
        if not self.taken:
            self._begin()
        self.label = label
        self.taken += 1

    def close(self) -> None:
        """End the turn, if there is one."""
        if self.taken:
            self._report(self.label, self.taken)

    @contextmanager
    def once(self, label: str) -> Iterator[Clock]:
        """A turn of its own for one step. All of it is timed, unless the caller restarts or stops the clock."""
        self.close()
        self._begin()
        yield self.clock
        self._report(label, 1)

    def done(self) -> EnoughError:
        """Report that no more turns are needed. Returns the exception that ends the program."""
        self.close()
        self._send({"done": True})
        return EnoughError()

    def _begin(self) -> None:
        self._send({"ready": True})
        if not self.lines.readline():
            raise SystemExit("the process that gives the turns has ended")
        self.clock = Clock(self.wait)

    def _report(self, label: str | None, steps: int) -> None:
        self.taken = 0
        self.clock.stop()
        self._send({"label": label, "seconds": self.clock.seconds / steps, "cpu": self.clock.cpu / steps})

    def _send(self, message: dict[str, Any]) -> None:
        self.lines.write(json.dumps(message) + "\n")
        self.lines.flush()


class Clock:
    """Measures a turn or a part of it: from the last `restart` to the first `stop`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        """wait: waits until the device is idle."""
        self.wait = wait
        self.restart()

    def restart(self) -> None:
        self.wait()
        self.seconds, self.cpu = -time.perf_counter(), -time.process_time()
        self.running = True

    def stop(self) -> None:
        if self.running:
            self.wait()
            self.seconds += time.perf_counter()
            self.cpu += time.process_time()
            self.running = False


@dataclass(frozen=True)
class Step:
    """A measured step. seconds: until the slowest process was done. cpu: seconds of CPU of all processes."""

    seconds: float
    cpu: float


@dataclass
class Program:
    """A program that takes turns. processes: the number of its processes that connect. log: the file of its output.
    folder: the working folder."""

    name: str
    command: list[str]
    processes: int
    log: Path
    environment: dict[str, str]
    folder: Path | None = None
    steps: dict[str, int] = field(default_factory=dict)  # of a whole run, by kind
    flops: int = 0  # of a whole run, all ranks together; 0: unknown
    measured: dict[str, list[Step]] = field(default_factory=dict)  # by kind
    _lines: list[Any] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None
    _planned: int = 1
    _taken: int = 0
    _done: bool = False

    def start(self) -> None:
        """Start the program, or its launcher."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=self.folder
            )

    def joined(self, lines: Any, plan: dict[str, Any]) -> None:
        """Add a process that has connected and sent its plan."""
        self._lines.append(lines)
        self.steps, self._planned, self.flops = plan["steps"], plan["turns"], plan["flops"]

    @property
    def complete(self) -> bool:
        """Whether all processes have connected. Raises SystemExit where the program has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise SystemExit(self.failed())
        return len(self._lines) == self.processes

    @property
    def share(self) -> float:
        """The share of its turns that it has had."""
        return (self._taken + 0.5) / self._planned

    def ready(self) -> bool:
        """Wait until the program is ready for a turn, or done. Returns whether it needs a turn."""
        self._done = any("done" in message for message in self._read())
        return not self._done

    def take(self) -> tuple[str | None, Step]:
        """Give the program a turn, and wait for its end. Returns the kind of its steps, None when they are not counted,
        and their average."""
        for lines in self._lines:
            lines.write("go\n")
            lines.flush()
        reports = list(self._read())
        self._taken += 1
        step = Step(max(report["seconds"] for report in reports), sum(report["cpu"] for report in reports))
        label: str | None = reports[0]["label"]
        if label is not None:
            self.measured.setdefault(label, []).append(step)
        return label, step

    def end(self) -> None:
        """Wait for the end of the program; terminate it first, unless it is done."""
        if self._process is not None:
            if not self._done:
                self._process.terminate()
            self._process.wait()

    def failed(self) -> str:
        """The message for a program that has ended too early."""
        tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        return f"{self.name} has ended too early; the last lines that it printed:\n{tail}"

    def _read(self) -> Iterator[dict[str, Any]]:
        for lines in self._lines:
            if not (line := lines.readline()):
                raise SystemExit(self.failed())
            yield json.loads(line)


def take_turns(programs: list[Program], address: Path, took: Callable[[str, str, Step], None]) -> None:
    """Start the programs, which connect to `address`, and give each its turns, spread evenly over the time that all of
    them take together. took: called after every turn with the program's name, the kind of step and a step."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        server.settimeout(1.0)
        try:
            for program in programs:
                program.start()
            while [program for program in programs if not program.complete]:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                connection.setblocking(True)
                lines = connection.makefile("rw")
                plan = json.loads(lines.readline())
                next(program for program in programs if program.name == plan["name"]).joined(lines, plan)
            waiting = [program for program in programs if program.ready()]
            while waiting:
                program = min(waiting, key=lambda program: program.share)
                label, step = program.take()
                took(program.name, label or "not counted", step)
                if not program.ready():
                    waiting.remove(program)
        finally:
            for program in programs:
                program.end()
