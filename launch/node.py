"""What a job does on each of its nodes: torchrun over all that the node has, to the end or a stop.

    srun --ntasks-per-node=1 python -m dist_train.launch.node [arguments of python -m dist_train.main]

slurm/train.sh runs this line, and launch.submit the same through submitit. The scheduler's stop signals come here.
They are passed on to the ranks, which finish their step, save it and leave; the job then goes back into the queue, and
goes on from there on whatever nodes it gets.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.command_line import command
from dist_train.config.arguments import parser, resolve
from dist_train.config.settings import TrainConfig
from dist_train.distributed.launcher import gpus_here, ranks_per_node
from dist_train.errors import BAD_INPUT, DONE, FAILED, PREEMPTED, UserError, code_of, say
from dist_train.files import write_atomic
from dist_train.reports import table
from dist_train.runs import layout
from dist_train.runs.history import read_history
from dist_train.runs.run import Run
from dist_train.signals import SIGNALS, ignore_at_exit

_MEET = 180.0  # seconds for the nodes to find each other; network file systems show a new file after a minute
_REQUEUED = 60.0  # seconds for Slurm to end a job that it has put back into the queue
_END = 5.0  # seconds for rank 0, which may be on another node, to say how the run has ended
_WITHOUT_PROGRESS = 10  # restarts after which a job without a new checkpoint is not queued again


@dataclass(frozen=True)
class Place:
    """This node among those of its job. start: a name for this start of the job, the same on all of its nodes."""

    index: int
    nodes: int
    cpus: int
    start: str

    @property
    def main(self) -> bool:
        return self.index == 0


def place() -> Place:
    """This node, as Slurm describes it to a step of a job; alone without Slurm."""
    cpus = len(os.sched_getaffinity(0))
    if "SLURM_STEP_ID" not in os.environ:
        return Place(0, 1, cpus, "alone")
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or cpus
    return Place(
        int(os.environ["SLURM_NODEID"]),
        int(os.environ["SLURM_STEP_NUM_NODES"]),
        min(cpus, int(given)),
        f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}",
    )


def local_ranks(train: TrainConfig, nodes: int, cpus: int) -> int:
    """How many ranks to start on each of `nodes` nodes like this one. Raises UserError where there can be none."""
    gpus = 0 if train.device == "cpu" else gpus_here()
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if not gpus and train.device != "cpu" and given.isdigit() and int(given):
        raise UserError(
            f"Slurm gave {given} GPUs of {platform.node()} to this job, but torch sees none there; install a torch "
            f"that fits the driver, or use train.device=cpu"
        )
    if nodes > train.microbatches:
        raise UserError(
            f"train.microbatches = {train.microbatches} gives work to {train.microbatches} ranks at most, but the job "
            f"has {nodes} nodes; ask for fewer, or raise train.microbatches"
        )
    return ranks_per_node(train.microbatches, gpus or max(1, cpus // train.threads), nodes)


def torchrun(arguments: Sequence[str], per_node: int, here: Place, meeting: str = "") -> list[str]:
    """The command for this node's ranks. meeting: HOST:PORT of the first node, where there are several."""
    if here.nodes == 1:
        where = ["--standalone"]
    else:
        host, _, port = meeting.rpartition(":")
        where = [f"--nnodes={here.nodes}", f"--node-rank={here.index}"]
        where += [f"--master-addr={host}", f"--master-port={port}"]
    start = [sys.executable, "-m", "dist_train.launch.agent", *where, f"--nproc-per-node={per_node}"]
    return [*start, "-m", "dist_train.main", *arguments]


@dataclass
class Training:
    """One training, of which each node of a job runs its part. submitit pickles it, calls it, and calls `checkpoint` on
    the first node when the job is to be stopped.

    arguments: of dist_train.main. run_dir: goes before theirs; may name the job by %j, an array of jobs by %A. group:
    whether the folder above is a group's, of which W&B has the name, and in which the members' table is kept.
    """

    arguments: list[str]
    run_dir: Path
    group: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    stopping: bool = False

    def __call__(self) -> str:
        """Returns the run folder of a training that is done, and otherwise leaves with its exit code."""
        code = self.run()
        if code == PREEMPTED:  # the first node is in `checkpoint`, and speaks to the scheduler
            time.sleep(_REQUEUED)
        if code:
            sys.exit(code)  # no exception: the log's end belongs to the rank that failed
        return str(self.run_dir)

    def run(self) -> int:
        """Train until all is done or stopped. Returns the exit code."""
        ignore_at_exit()
        try:
            return self._run()
        except UserError as error:
            say(str(error))
            return BAD_INPUT

    def _run(self) -> int:
        here = place()
        self.run_dir = Path(_named(str(self.run_dir))).absolute()
        _, settings = resolve(parser().parse_intermixed_args(self.arguments))
        per_node = local_ranks(settings.train, here.nodes, here.cpus)
        meeting = self._meet(here) if here.nodes > 1 else ""
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.train.threads))
        if self.group:
            os.environ.setdefault("WANDB_RUN_GROUP", self.run_dir.parent.name)
        arguments = [*self.arguments, "--run-dir", str(self.run_dir)]  # the last one counts
        known = len(read_history(self.run_dir))
        code = FAILED
        if not self.stopping:
            self.process = subprocess.Popen(torchrun(arguments, per_node, here, meeting))
            if self.stopping:  # meanwhile
                self.stop()
            while not self._ended():
                time.sleep(0.1)
            code = self.process.wait()
            if code == BAD_INPUT:
                return code
        if code != DONE:  # by its record: a late signal may end torchrun when its ranks have done all
            code = code_of(_outcome(self.run_dir, known, self.stopping))
        if code == DONE and here.main and self.group:
            try:
                print(table.write(self.run_dir.parent), flush=True)
            except UserError as error:  # another member's folder is damaged; this training is done
                say(f"no table: {error}")
        return code

    def stop(self) -> None:
        """Have the ranks finish their step, save it and leave, and wait for it. Safe in a signal handler."""
        self.stopping = True
        if self.process is not None and not self._ended():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)  # not Popen.send_signal, which polls
            while not self._ended():
                time.sleep(0.1)

    def checkpoint(self) -> Any:
        """submitit's protocol: stop, and return what to run when the job starts again."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(Training(self.arguments, self.run_dir, self.group))

    def _ended(self) -> bool:
        # Popen.poll takes a lock, on which a signal handler that waits here would wait for itself
        assert self.process is not None
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _meet(self, here: Place) -> str:
        """HOST:PORT where the ranks of all nodes meet: the first node chooses it and leaves it in the run folder.
        Raises UserError when this node does not see it there."""
        folder = self.run_dir / layout.MEETINGS
        path = folder / here.start
        if here.main:
            with socket.socket() as free:
                free.bind(("", 0))
                meeting = f"{os.environ.get('SLURMD_NODENAME', platform.node())}:{free.getsockname()[1]}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.iterdir():
                    old.unlink()
                write_atomic(path, meeting.encode())
            except OSError as error:
                raise UserError(
                    f"--run-dir {self.run_dir}: cannot be written ({error.strerror}); name another folder"
                ) from None
            return meeting
        deadline = time.monotonic() + _MEET
        while time.monotonic() < deadline and not self.stopping:
            # a listing is read anew where a network file system would remember that a file was not there
            if folder.is_dir() and path in folder.iterdir():
                return path.read_text()
            time.sleep(0.5)
        if self.stopping:
            return ""
        raise UserError(
            f"--run-dir {self.run_dir}: {platform.node()} does not see there what the job's first node wrote; "
            f"name a folder on a file system that all nodes share"
        )


def as_name(text: str) -> str:
    """The text as a file's name."""
    return re.sub(r"[^A-Za-z0-9.]", "_", text)


def _named(path: str) -> str:
    """Put the job's number in a path."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID") or "alone"
    return path.replace("%j", job).replace("%A", job)


def _outcome(run_dir: Path, known: int, stopping: bool) -> str:
    """How a training has ended, `done`, `preempted` or `failed`, by what its history says after the `known` lines;
    where it says nothing and was asked to stop, that came before it began. torchrun says of any end only that it
    failed, and rank 0 may be on another node."""
    deadline = time.monotonic() + _END
    while True:
        said = read_history(run_dir)[known:]
        if said and said[-1]["event"] == "end":
            return str(said[-1]["outcome"])
        if not said and stopping:
            return "preempted"
        if time.monotonic() > deadline:
            return "failed"
        time.sleep(0.2)


def _member() -> tuple[Path, list[str]]:
    """The run folder, and the settings, that Slurm's variables give to a job without --run-dir: each member of an
    array is a seed."""
    name = as_name(os.environ.get("SLURM_JOB_NAME", "train"))
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        seed = os.environ["SLURM_ARRAY_TASK_ID"]
        return Path("runs") / f"{name}-%A" / f"seed{seed}", [f"train.seed={seed}"]
    return Path("runs") / f"{name}-%j", []


def _requeue(run_dir: Path, step: int, asked: Sequence[int]) -> bool:
    """Put this job back into the queue, unless somebody has cancelled it. step: of the newest checkpoint when it
    started. asked: the signals that it was stopped by. Returns whether it will run again."""
    job, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if restarts >= _WITHOUT_PROGRESS and _newest(run_dir) == step:
        say(f"job {job} was started {restarts + 1} times and made no progress in the last; it is not queued again")
        return False
    shown = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=False)
    # a plain SIGTERM is a preemption's, or it is srun's, which ends the other nodes when one has failed
    plain = {*asked} == {signal.SIGTERM} and " PreemptTime=None " in shown.stdout
    if " JobState=RUNNING " not in shown.stdout or plain:
        return False
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip()
        say(f"job {job} could not be put back into the queue ({reason}); submit it again with --run-dir {run_dir}")
        return False
    return True


def _newest(run_dir: Path) -> int:
    return max(Run(run_dir).checkpoints, default=0)


@command
def main(arguments: list[str] | None = None) -> int:
    """One node of a batch job. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_intermixed_args(arguments)
    run_dir, extra = (given.run_dir, []) if given.run_dir else _member()
    training = Training([*arguments, *extra], run_dir, group="SLURM_ARRAY_TASK_ID" in os.environ)
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) == 1:  # the first waits for the ranks
            training.stop()

    for number in SIGNALS:
        signal.signal(number, stop)
    here = place()
    step = _newest(Path(_named(str(run_dir))))
    if here.main:
        print(f"node {platform.node()}: {shlex.join(['dist_train.main', *training.arguments])}", flush=True)
    code = training.run()
    slurm = "SLURM_JOB_ID" in os.environ and asked[:1] != [signal.SIGINT]
    # only the first node speaks to Slurm; one that left before would have srun end the others
    if code == PREEMPTED and slurm and (not here.main or _requeue(training.run_dir, step, asked)):
        time.sleep(_REQUEUED)
    return code


if __name__ == "__main__":
    sys.exit(main())
