"""Fault injection: whatever is killed, paused or damaged at any moment, a run ends with the same bits.

    python -m tests.faults --faults 200 --seed 0
    python -m tests.faults --faults 20 --launcher torchrun

A run is started repeatedly, each time on a random number of ranks, and each launch has a random fault at a random
moment, until the run is finished. Then its weights and its metrics must be those of an undisturbed run on one rank,
byte for byte. After every launch the invariants are checked from outside: by files, exit codes and times.

Ranks are real processes over real gloo. Importing torch and ffcv takes longer than a launch, so they are forked from
this process, which has imported both; `--launcher torchrun` starts them like a user. Only processes that this harness
started are killed or paused. The plan of a launch is determined by the seed, the run and the launch, which its line
shows; the time of its moment depends on the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dist_train.data_prep import ffcv_library

REPOSITORY = Path(__file__).parent.parent
TIMEOUT = 10  # train.timeout of every run
JOIN = 2 * (TIMEOUT + 30)  # seconds that a starting rank waits for its peers: torch tries twice
SLACK = 10  # seconds for a busy machine
LAUNCH = 240  # seconds after which a launch counts as hanging

DONE, FAILED, PREEMPTED = 0, 1, 75
JOINED = b"run folder"  # rank 0 prints this when all ranks have joined
STOPS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGUSR2": signal.SIGUSR2}
# Weights with which the faults are drawn. A hang never ends: its peers wait for train.timeout, which takes long.
FAULTS = {"kill one": 26, "kill all": 16, "SIGTERM": 16, "SIGUSR1": 9, "SIGUSR2": 9, "pause": 10, "hang": 4}
# Weights of the moments of a fault: at a time after the start, after a step, while a checkpoint is written, when a new
# checkpoint has been renamed, between summary and plots.
MOMENTS = {"time": 45, "step": 25, "writing": 14, "named": 10, "summary": 6}
DAMAGES = ("truncated", "altered a byte of", "removed the checksum of", "appended half a line to")
# Keys of the summary that must be those of the undisturbed run.
RESULTS = (
    *("weights_sha256", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "best_test_accuracy"),
    *("best_epoch", "epochs", "steps", "parameters", "flops_per_image", "train_flops"),
)


class FoundError(Exception):
    """An invariant does not hold."""


# Run folders and their invariants.


def record(folder: Path) -> list[bytes]:
    """The complete lines of a run's metrics.jsonl, without speeds."""
    path = folder / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    *whole, _ = content.split(b"\n")
    return [re.sub(rb'"images_per_second": [^,}]*', b'"images_per_second": 0', line) for line in whole]


def last_step(lines: list[bytes]) -> int:
    """The last step in lines of metrics.jsonl, 0 for none."""
    return max(_steps(lines), default=0)


def good_checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints that match their checksums, in order."""
    found = []
    for path in sorted((folder / "checkpoints").glob("step-*.pt")):
        checksum = path.with_name(path.name + ".sha256")
        if checksum.exists() and checksum.read_text().split()[:1] == [hashlib.sha256(path.read_bytes()).hexdigest()]:
            found.append(int(path.stem.removeprefix("step-")))
    return found


def check_record(lines: list[bytes], expected: list[bytes]) -> list[str]:
    """Errors in lines of metrics.jsonl that should be the beginning of `expected`."""
    try:
        steps = _steps(lines)
    except (ValueError, LookupError, TypeError) as error:
        return [f"the record holds a line that is none ({error!r})"]
    wrong = [f"step {step} is recorded {count} times" for step, count in Counter(steps).items() if count > 1]
    if missing := sorted(set(range(1, max(steps, default=0) + 1)) - set(steps)):
        wrong.append(f"the record lacks step {', '.join(map(str, missing))}")
    if not wrong and lines != expected[: len(lines)]:
        number = next(i for i, line in enumerate(lines) if line not in expected[i : i + 1])
        other = expected[number].decode() if number < len(expected) else "nothing"
        wrong.append(f"line {number + 1} of the record is\n  {lines[number].decode()}\ninstead of\n  {other}")
    return wrong


def check_finished(folder: Path, reference: Path) -> list[str]:
    """Errors in a finished run, whose metrics and summary must be those of the reference."""
    lines, expected = record(folder), record(reference)
    wrong = check_record(lines, expected)
    if not wrong and len(lines) < len(expected):
        wrong.append(f"the record ends with line {len(lines)} of {len(expected)}")
    if not (folder / "summary.json").exists():
        return [*wrong, "the run is finished and has no summary"]
    found, right = (json.loads((path / "summary.json").read_text()) for path in (folder, reference))
    return wrong + [f"{key} is {found[key]} instead of {right[key]}" for key in RESULTS if found[key] != right[key]]


def _steps(lines: list[bytes]) -> list[int]:
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if row["kind"] == "step"]


# Processes.


def warm_up() -> None:
    """Import all modules of a rank without starting a thread, for which a forked process would wait forever."""
    if find_spec("ffcv"):
        numba: Any = import_module("numba")
        # ffcv sets its number of threads while it is imported, for which numba would start them
        start_threads, numba.set_num_threads = numba.set_num_threads, lambda _: None
        if ffcv_library.version():
            compiler: Any = import_module("ffcv.pipeline.compiler")
            compiler.set_num_threads = start_threads
            # numba takes long to compile its first function
            manager: Any = import_module("ffcv.memory_managers.os_cache").OSCacheManager
            manager.__new__(manager).compile_reader()
        numba.set_num_threads = start_threads
    # torch.use_deterministic_algorithms imports the first, the others are imported where they are used
    late = ("torch._inductor", "matplotlib.figure", "matplotlib.backends.backend_agg")
    for name in (*late, "dist_train.main", "dist_train.training.train"):
        import_module(name)


def fork(work: Callable[[], int], variables: dict[str, str], log: Path) -> int:
    """Run `work`, which returns an exit code, in a new process that dies with this one. Returns its process id.

    variables: what is added to the environment. log: where its output goes."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"this process has {threads} threads; one that is forked from it could hang")
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        os.setpgid(0, 0)  # a Ctrl-C is for the harness
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() == parent:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream, to in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(to, stream)
            os.environ.update(variables)
            code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as dist_train.main leaves


class Forked:
    """The ranks of one launch, forked from this process."""

    INTERVAL = 0.002  # seconds between two looks
    PATIENCE = 0  # seconds that a launcher gives its ranks to leave

    def __init__(self, arguments: list[str], ranks: int, log: Path) -> None:
        self._codes: dict[int, int] = {}
        self._running: dict[int, int] = {}
        port = str(_free_port())
        for rank in range(ranks):
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            # a single one starts without them, like python -m dist_train.main
            self._running[rank] = fork(lambda: _train(arguments), variables if ranks > 1 else {}, log)

    def living(self) -> dict[int, int]:
        """The process of each rank that has not ended."""
        for rank, pid in list(self._running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._codes[rank] = os.waitstatus_to_exitcode(status)
                del self._running[rank]
        return dict(self._running)

    def ended(self) -> bool:
        """Whether nothing of the launch is left."""
        return not self.living()

    def codes(self) -> list[int]:
        """The exit codes of the ranks; minus the number of the signal that ended one."""
        return [code for _, code in sorted(self._codes.items())]

    def stop_rest(self) -> bool:
        """When a rank has failed, send SIGTERM to the others, as torchrun does. Returns whether it was sent."""
        living = self.living()
        if not any(self._codes.values()):
            return False
        for pid in living.values():
            os.kill(pid, signal.SIGTERM)
        return bool(living)

    def end(self) -> None:
        """Kill all that is left."""
        while living := self.living():
            for pid in living.values():
                os.kill(pid, signal.SIGKILL)
            time.sleep(self.INTERVAL)


class Torchrun:
    """The ranks of one launch, started by the real torchrun, which does not hand on their exit codes."""

    INTERVAL = 0.01
    PATIENCE = 60  # and in which they have imported everything

    def __init__(self, arguments: list[str], ranks: int, log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "dist_train.main", *arguments]
        self._folder = os.fsencode(arguments[-1])
        self._ranks = ranks
        self._seen: dict[int, int] = {}
        self._code: int | None = None
        self._launcher = fork(lambda: _become(command), {}, log)

    def living(self) -> dict[int, int]:
        """The process of each rank that has started and not ended."""
        if len(self._seen) < self._ranks:
            self._search()
        return {rank: pid for rank, pid in self._seen.items() if _status(pid).get("State", "Z")[0] not in "ZX"}

    def ended(self) -> bool:
        """Whether nothing of the launch is left."""
        if self._code is None:
            ended, status = os.waitpid(self._launcher, os.WNOHANG)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None and not self.living()

    def codes(self) -> list[int]:
        """torchrun's own exit code."""
        assert self._code is not None
        return [self._code]

    def stop_rest(self) -> bool:
        """Nothing to do: torchrun does it."""
        return False

    def kill_launcher(self) -> None:
        """Kill torchrun alone."""
        os.kill(self._launcher, signal.SIGKILL)

    def end(self) -> None:
        """Kill all that is left."""
        while not self.ended():
            for pid in [*self.living().values(), *([self._launcher] if self._code is None else [])]:
                os.kill(pid, signal.SIGKILL)
            time.sleep(self.INTERVAL)

    def _search(self) -> None:
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or self._folder not in (entry / "cmdline").read_bytes().split(b"\0"):
                    continue
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            for rank in (int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")):
                self._seen[rank] = int(entry.name)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of a signal."""
    return bool(int(_status(pid).get("SigCgt", "0"), 16) >> (number - 1) & 1)


def _train(arguments: list[str]) -> int:
    from dist_train.main import main

    return main(arguments)


def _become(command: list[str]) -> int:
    os.execv(command[0], command)


def _status(pid: int) -> dict[str, str]:
    """The status of a process in /proc; empty when there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# Faults.


@dataclass(frozen=True)
class Variant:
    """The settings in which runs differ. Only the precision may change what comes out."""

    precision: str
    loader: str
    every_steps: int
    keep: int

    def settings(self) -> list[str]:
        return [f"{name}={value}" for name, value in vars(self).items()]


VARIANTS = (
    Variant("bf16", "resident", 3, 2),
    Variant("fp32", "stream", 1, 1),
    Variant("bf16", "stream", 3, 1),
    Variant("fp32", "resident", 1, 2),
)


@dataclass(frozen=True)
class Plan:
    """The faults of a launch. moment: one of MOMENTS. share: position of the moment in the launch, from 0 to 1. delay:
    seconds after an event. pause: seconds. launcher: whether the other ranks get SIGTERM when a rank has failed, as
    from torchrun, or must end by themselves. damage: one of DAMAGES, done to the folder before, or ""."""

    ranks: int
    fault: str
    victim: int
    moment: str
    share: float
    delay: float
    pause: float
    launcher: bool
    damage: str


def draw(rng: random.Random, faults: dict[str, int]) -> Plan:
    """The plan of a launch. faults: the weights with which they are drawn."""
    fault, moment = (rng.choices(list(odds), list(odds.values()))[0] for odds in (faults, MOMENTS))
    ranks = rng.randint(2, 4) if fault == "hang" else rng.randint(1, 4)
    return Plan(
        ranks=ranks,
        fault=fault,
        victim=rng.randrange(ranks),
        moment=moment,
        share=rng.random(),
        delay=0.0 if moment == "time" else rng.choice((0.0, rng.uniform(0, 0.03))),
        pause=rng.uniform(0.5, 0.4 * TIMEOUT),
        launcher=rng.random() < 0.5,
        damage=rng.choice(DAMAGES) if rng.random() < 0.3 else "",
    )


def do_damage(folder: Path, how: str, rng: random.Random) -> str:
    """Damage a run folder as a bad disk could. Returns the name of the file, "" when there is none yet, or no
    checkpoint before it."""
    path = folder / "metrics.jsonl"
    if how == "appended half a line to":
        if not path.exists():
            return ""
        with path.open("ab") as file:
            file.write(b'{"kind": "step", "step": 1234567890'[: rng.randint(1, 35)])
        return path.name
    checkpoints = sorted((folder / "checkpoints").glob("step-*.pt"))
    # without another one the trainer refuses to start the run over
    if len(checkpoints) < 2 or not {int(path.stem[5:]) for path in checkpoints[:-1]} & {*good_checkpoints(folder)}:
        return ""
    path = checkpoints[-1]
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "altered a byte of":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)
    return path.name


class Folder:
    """Reads a run folder, fast enough for hundreds of times a second."""

    def __init__(self, path: Path, before: int) -> None:
        """before: the step that the launch resumes from."""
        self.metrics, self.checkpoints, self.summary = (
            path / name for name in ("metrics.jsonl", "checkpoints", "summary.json")
        )
        self.before, self.had, self.had_summary = before, self._names(), self.summary.exists()
        self.size, self.steps, self.cut = -1, 0, False

    def new_steps(self) -> int:
        """The number of steps that this launch has written to metrics.jsonl."""
        try:
            size = self.metrics.stat().st_size
        except OSError:
            size = 0
        if size != self.size:
            self.size = size
            self.steps = self.metrics.read_bytes().count(b'"kind": "step"') if size else 0
        self.cut = self.cut or self.steps <= self.before  # those behind the checkpoint are cut off at the start
        return max(0, self.steps - self.before) if self.cut else 0

    def happened(self, moment: str) -> bool:
        """Whether that one of MOMENTS which is an event has come in this launch."""
        if moment == "summary":
            return not self.had_summary and self.summary.exists()
        start = ".step-" if moment == "writing" else "step-"
        new = self._names() - self.had
        return any(name.startswith(start) and ".pt" in name and ".sha256" not in name for name in new)

    def _names(self) -> set[str]:
        try:
            return {entry.name for entry in os.scandir(self.checkpoints)}
        except OSError:
            return set()


@dataclass
class Seen:
    """Observations of a launch; times in seconds after its start. steps: when each new step was written. fault: when it
    was injected, None when the launch ended before. caught: whether the victim had a handler of the signal. joined:
    whether all ranks had joined by then. acted: whether a launcher's SIGTERM was sent. codes: exit codes of the ranks,
    or of torchrun."""

    steps: list[float] = field(default_factory=list)
    fault: float | None = None
    victim: int = 0
    caught: bool = False
    joined: bool = False
    acted: bool = False
    ended: float = 0.0
    codes: list[int] = field(default_factory=list)


class Launch:
    """One start of the trainer, with the faults of its plan."""

    def __init__(self, group: Forked | Torchrun, folder: Folder, log: Path, plan: Plan | None, due: float) -> None:
        """plan: None for no faults. due: its moment, in seconds after the start or in new steps."""
        self.group, self.folder, self.log, self.plan, self.due = group, folder, log, plan, due
        self.seen, self.armed = Seen(), float("inf")  # armed: when the moment came, with the delay
        self.resume = self.deadline = float("inf")  # when the pause ends; when all must have left

    def watch(self) -> Seen:
        """Inject the planned faults and wait for the end. Raises FoundError when a rank does not end in time."""
        start = time.monotonic()
        try:
            while not self.group.ended():
                time.sleep(self.group.INTERVAL)
                now = time.monotonic() - start
                self.seen.steps += [now] * (self.folder.new_steps() - len(self.seen.steps))
                if self.plan:
                    self._disturb(self.plan, now)
                if now > min(self.deadline, LAUNCH):
                    late = ", ".join(f"rank {rank}" for rank in self.group.living()) or "the launcher"
                    raise FoundError(f"{late} is still there {now - (self.seen.fault or 0):.1f} s after the fault")
        finally:
            self.group.end()
        self.seen.ended = self.seen.ended or time.monotonic() - start
        self.seen.codes = self.group.codes()
        return self.seen

    def _disturb(self, plan: Plan, now: float) -> None:
        seen = self.seen
        if seen.fault is None:
            if now < self.armed and self._moment_came(plan, now):
                self.armed = min(self.armed, now + plan.delay)
            if now >= self.armed and (living := self.group.living()):
                seen.fault, seen.victim = now, plan.victim if plan.victim in living else min(living)
                seen.joined = self.log.exists() and JOINED in self.log.read_bytes()
                self._inject(plan, now, living)
        elif plan.fault == "pause":
            if now >= self.resume and seen.victim in (living := self.group.living()):
                os.kill(living[seen.victim], signal.SIGCONT)
                self.resume = float("inf")
        elif plan.fault == "hang":
            if list(self.group.living()) == [seen.victim]:  # it cannot leave by itself
                seen.ended = now
                self.group.end()
        elif plan.launcher and plan.fault != "kill all" and not seen.acted:
            seen.acted = self.group.stop_rest()

    def _moment_came(self, plan: Plan, now: float) -> bool:
        if plan.moment == "time":
            return now >= self.due
        if plan.moment == "step":
            return len(self.seen.steps) >= self.due
        return self.folder.happened(plan.moment)

    def _inject(self, plan: Plan, now: float, living: dict[int, int]) -> None:
        pid = living[self.seen.victim]
        patience = SLACK + self.group.PATIENCE + (TIMEOUT if self.seen.joined else JOIN)
        if plan.fault == "kill one":
            os.kill(pid, signal.SIGKILL)
        elif plan.fault == "kill all":
            for each in living.values():
                os.kill(each, signal.SIGKILL)
        elif plan.fault == "kill launcher":
            assert isinstance(self.group, Torchrun)
            self.group.kill_launcher()
        elif plan.fault in STOPS:
            self.seen.caught = catches(pid, STOPS[plan.fault])
            os.kill(pid, STOPS[plan.fault])
        else:
            os.kill(pid, signal.SIGSTOP)
            self.resume = now + plan.pause
            # a rendezvous store on the stopped rank is given some time to answer, too
            patience = LAUNCH if plan.fault == "pause" else patience + TIMEOUT + SLACK
        self.deadline = now + patience


def check_codes(fault: str, seen: Seen, finished: bool) -> list[str]:
    """Errors in the exit codes of forked ranks. fault: "" for none. finished: whether the last step has a
    checkpoint, after which a rank may be done whatever happens to the others."""
    said = f"exit codes {' '.join(map(str, seen.codes))}"
    if DONE in seen.codes and not finished:
        return [f"{said}, but the last step has no checkpoint"]
    if set(seen.codes) == {DONE} or (fault in STOPS and set(seen.codes) == {PREEMPTED}):
        return []
    if fault in ("", "pause"):
        return [f"{said}, but no rank was ended"]
    if fault in STOPS and seen.caught and not finished:
        return [f"{said}, although rank {seen.victim} had a handler of {fault}"]
    wrong = []
    for rank, code in enumerate(seen.codes):
        allowed = {FAILED, -signal.SIGTERM} if seen.acted else {FAILED}  # the latter before its handler is there
        if rank == seen.victim or fault == "kill all":
            allowed = {-STOPS.get(fault, signal.SIGKILL)}
        if code not in allowed and not (code == DONE and finished):
            wrong.append(f"{said}: that of rank {rank} does not follow from the fault")
    return wrong


# Runs of several launches.


@dataclass
class Pace:
    """Times of the launches so far: seconds to the first step, for each step, and after the last."""

    start: float = 3.0
    step: float = 0.1
    end: float = 1.0

    def learn(self, seen: Seen, fault: str) -> None:
        if not seen.steps or fault in ("pause", "hang"):
            return
        first, last = seen.steps[0], seen.steps[-1]
        self.start = first
        if len(seen.steps) > 5:
            self.step = (last - first) / (len(seen.steps) - 1)
        if not fault:
            self.end = seen.ended - last


class Harness:
    """Starts runs and their launches, and counts the results."""

    def __init__(self, data: Path, out: Path, launcher: str, epochs: int, seed: int) -> None:
        self.data, self.out, self.epochs, self.seed = data, out, epochs, seed
        self.group = Torchrun if launcher == "torchrun" else Forked
        self.faults = {**FAULTS, "kill launcher": 8} if launcher == "torchrun" else FAULTS
        self.pace: dict[int, Pace] = {}
        self.references: dict[str, Path] = {}
        self.injected: Counter[str] = Counter()
        self.damaged: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self.longest: dict[str, float] = {}  # seconds from a fault until all ranks had left
        self.runs = 0

    def reference(self, precision: str) -> Path:
        """The folder of an undisturbed run on one rank, with another loader and fewer checkpoints than most of the
        runs that are compared with it."""
        if precision not in self.references:
            folder = self.out / f"reference-{precision}"
            seen = self._launch(Variant(precision, "resident", 0, 2), folder, folder.with_suffix(".log"), 1, None)
            self._require([*check_codes("", seen, finished=True), *check_finished(folder, folder)])
            print(f"reference in {precision}: {len(seen.steps)} steps, {seen.ended:.1f} s", flush=True)
            self.references[precision] = folder
        return self.references[precision]

    def run(self, faults: int, until: float) -> None:
        """One run from its start to its end, with that many faults at most and none after the time `until`. Raises
        FoundError; its folder and logs are kept then."""
        variant = VARIANTS[self.runs % len(VARIANTS)]
        reference = self.reference(variant.precision)
        self.runs += 1
        folder = self.out / f"run-{self.runs}"
        already = self.injected.total()
        launch, codes = 0, [FAILED]
        while any(codes):
            launch += 1
            self._require(["it does not get to its end"] if launch > 100 else [])
            disturb = self.injected.total() - already < faults and time.monotonic() < until
            codes = self._one_of_run(variant, folder, launch, disturb, record(reference))
        self._require(check_finished(folder, reference))
        shutil.rmtree(folder)
        for log in self.out.glob(f"run-{self.runs}.*.log"):
            log.unlink()

    def summary(self, seconds: float) -> str:
        """A summary of all launches in three lines."""
        damaged = f"{self.damaged.total()} damaged files ({_listed(self.damaged)})" if self.damaged else "no damage"
        sizes = ", ".join(f"{count} on {ranks}" for ranks, count in sorted(self.sizes.items()))
        longest = ", ".join(f"{fault} {seconds:.1f} s" for fault, seconds in self.longest.items())
        return (
            f"{self.injected.total()} faults ({_listed(self.injected)}) and {damaged}\n"
            f"longest until all ranks had left: {longest or 'none'}\n"
            f"{self.runs} runs in {self.sizes.total()} launches ({sizes} ranks), {seconds / 60:.1f} minutes, "
            f"seed {self.seed}: all weights and records equal"
        )

    def _one_of_run(
        self, variant: Variant, folder: Path, launch: int, disturb: bool, expected: list[bytes]
    ) -> list[int]:
        """One launch of a run, with the check of all invariants after it. Returns the exit codes."""
        rng = random.Random(f"{self.seed}/{self.runs}/{launch}")
        plan, total = draw(rng, self.faults), last_step(expected)
        damaged = do_damage(folder, plan.damage, rng) if disturb and plan.damage else ""
        before = max(good_checkpoints(folder), default=0)
        seen = self._launch(variant, folder, self._log(launch), plan.ranks, plan if disturb else None, before, total)
        lines, good = record(folder), good_checkpoints(folder)
        wrong = check_record(lines, expected)
        after, newest = 0 if wrong else last_step(lines), max(good, default=0)
        fault = "" if seen.fault is None else plan.fault

        whom = "" if fault in ("", "kill all", "kill launcher") else f" of rank {seen.victim}"
        when = "" if seen.fault is None else f" {seen.fault:.2f} s after the start ({plan.moment})"
        print(
            f"launch {self.sizes.total() + 1}: run {self.runs}.{launch} ({' '.join(variant.settings())}), "
            f"{f'{plan.damage} {damaged}, ' if damaged else ''}{plan.ranks} rank{'s' * (plan.ranks > 1)}, "
            f"{fault or 'no fault'}{whom}{when}{', SIGTERM to the rest' * seen.acted}: step {before} -> {after}, "
            f"checkpoints {' '.join(map(str, good)) or 'none'}, exit {' '.join(map(str, seen.codes))} "
            f"after {seen.ended:.2f} s",
            flush=True,
        )
        self.sizes[plan.ranks] += 1
        self.damaged.update([plan.damage] if damaged else [])
        if seen.fault is not None:
            self.injected[fault] += 1
            if fault != "pause":
                self.longest[fault] = max(seen.ended - seen.fault, self.longest.get(fault, 0.0))

        finished = newest == after == total
        if self.group is Forked:
            wrong += check_codes(fault, seen, finished)
            stopped = set(seen.codes) == {PREEMPTED}
        else:
            if (not finished) if seen.codes == [DONE] else fault in ("", "pause"):
                wrong.append(f"torchrun ended with {seen.codes[0]}")
            stopped = seen.caught or (fault == "kill launcher" and seen.joined)
        if newest < before:
            wrong.append(f"there was a good checkpoint of step {before}, and now the newest is of step {newest}")
        if newest > after:
            wrong.append(f"the checkpoint of step {newest} has no lines in the record, which ends at step {after}")
        if stopped and newest != after:
            wrong.append(f"stopped after step {after} with a checkpoint of step {newest}")
        self._require(wrong, launch)
        return seen.codes

    def _launch(
        self, variant: Variant, folder: Path, log: Path, ranks: int, plan: Plan | None, before: int = 0, total: int = 0
    ) -> Seen:
        """before: the step that the launch resumes from. total: the last step."""
        common = f"--preset digits data.dir={self.data} record.wandb=disabled record.quiet=true device=cpu"
        own = [f"epochs={self.epochs}", f"timeout={TIMEOUT}", *variant.settings(), "--run-dir", str(folder)]
        # the first time with so many ranks, the times of others are a guess
        pace = self.pace.setdefault(ranks, Pace(**vars(self.pace[1])) if 1 in self.pace else Pace())
        due = 0.0
        if plan and plan.moment == "time":
            due = plan.share * (pace.start + pace.step * (total - before) + pace.end)
        elif plan and plan.moment == "step":
            due = 1 + int(plan.share * (total - before))
        watched = Folder(folder, before)
        try:
            seen = Launch(self.group([*common.split(), *own], ranks, log), watched, log, plan, due).watch()
        except FoundError as error:
            raise FoundError(f"{log.name}: {plan}\n{error}\n{_tail(log)}") from None
        pace.learn(seen, plan.fault if plan and seen.fault is not None else "")
        return seen

    def _log(self, launch: int) -> Path:
        return self.out / f"run-{self.runs}.launch-{launch}.log"

    def _require(self, wrong: list[str], launch: int = 0) -> None:
        if wrong:
            log = self._log(launch)
            raise FoundError("\n".join([f"run {self.runs}.{launch}:", *wrong, *([_tail(log)] if log.exists() else [])]))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _tail(log: Path) -> str:
    return "\n".join([f"the end of {log}:", *log.read_text(errors="replace").splitlines()[-60:]])


def main() -> int:
    described = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("--faults", type=int, default=200, help="how many to inject")
    described.add_argument("--seed", type=int, default=0)
    described.add_argument("--minutes", type=float, default=float("inf"), help="inject none after this time")
    described.add_argument("--epochs", type=int, default=4, help="epochs of a run, 11 steps each")
    described.add_argument("--launcher", choices=("fork", "torchrun"), default="fork")
    described.add_argument("--data", type=Path, help="betons of the digits; written when not given")
    described.add_argument("--out", type=Path, help="a folder for the runs; a temporary one when not given")
    args = described.parse_args()
    start = time.monotonic()
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TORCHELASTIC_", "MASTER_"))]:
        del os.environ[name]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(REPOSITORY)
    out = args.out.absolute() if args.out else Path(tempfile.mkdtemp(prefix="faults-"))
    out.mkdir(parents=True, exist_ok=True)
    data = args.data.absolute() if args.data else out / "digits"
    if not args.data:
        command = [sys.executable, "-m", "dist_train.data_prep", "--dataset", "digits", "--out", str(data)]
        subprocess.run(command, check=True)
    if args.launcher == "fork":
        warm_up()
    harness = Harness(data, out, args.launcher, args.epochs, args.seed)
    until = start + 60 * args.minutes
    try:
        while (left := args.faults - harness.injected.total()) > 0 and time.monotonic() < until:
            harness.run(left, until)
    except FoundError as error:
        print(f"\nFAILED after {harness.injected.total()} faults, seed {args.seed}: {error}\neverything is in {out}")
        return 1
    print(harness.summary(time.monotonic() - start))
    if not args.out:
        shutil.rmtree(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
