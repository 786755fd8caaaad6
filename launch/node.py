"""The command that a job runs on each of its nodes: the ranks on the node's GPUs or CPUs, until done or stopped.

    srun --ntasks-per-node=1 python -m dist_train.launch.node [arguments of python -m dist_train.main]

slurm/train.sh runs this command, and launch.submit runs the same through submitit. It receives the scheduler's stop
signals and forwards them to the ranks, which finish their step, save a checkpoint and exit; the job is then requeued,
and resumes from the checkpoint on any nodes.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
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

from dist_train.command_line import command, survive_output
from dist_train.config.arguments import parser, resolve
from dist_train.config.settings import TrainConfig
from dist_train.distributed.launcher import gpus_here, ranks_per_node, variable, without_launcher
from dist_train.errors import BAD_INPUT, DONE, FAILED, PREEMPTED, UserError, code_of, say, show
from dist_train.files import write_atomic
from dist_train.launch import cluster
from dist_train.reports import table
from dist_train.runs import layout
from dist_train.runs.history import read_history
from dist_train.runs.run import Run
from dist_train.signals import SIGNALS, ignore_at_exit

_MEET = 180.0  # seconds for the nodes to rendezvous; a network file system may show a new file only after a minute
_REQUEUED = 60.0  # seconds for Slurm to end a job that it has requeued
_END = 5.0  # seconds for rank 0, which may be on another node, to write to the history how the run ended
_WITHOUT_PROGRESS = 10  # restarts after which a job without a new checkpoint is not requeued


@dataclass(frozen=True)
class JobNode:
    """This node of a job. index: its number, from 0. nodes: how many the job has. cpus: that this job may use on it.
    start: a name of this start of the job, the same on all of its nodes."""

    index: int
    nodes: int
    cpus: int
    start: str

    @property
    def main(self) -> bool:
        """Whether this is the job's first node."""
        return self.index == 0


def current_node() -> JobNode:
    """This node, from Slurm's variables in a job step; the only one without Slurm. Raises LauncherError."""
    cpus = len(os.sched_getaffinity(0))
    if "SLURM_STEP_ID" not in os.environ:
        return JobNode(0, 1, cpus, "alone")
    remedy = "start with srun, which sets it"
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if os.environ.get(name):
            cpus = min(cpus, variable(name, 1, remedy=remedy))
            break
    nodes = variable("SLURM_STEP_NUM_NODES", 1, remedy=remedy)
    start = f"{variable('SLURM_JOB_ID', 1, remedy=remedy)}.{_restarts()}"
    return JobNode(variable("SLURM_NODEID", 0, nodes - 1, remedy), nodes, cpus, start)


def _restarts() -> int:
    """How often Slurm has started this job again."""
    name = "SLURM_RESTART_COUNT"  # not set at the first start
    return variable(name, 0, remedy="submit with sbatch, which sets it") if name in os.environ else 0


def local_ranks(train: TrainConfig, nodes: int, cpus: int) -> int:
    """The number of ranks to start on each of `nodes` nodes like this one. cpus: of this node. Raises UserError when
    torch finds none of the GPUs that Slurm allocated, or there are more nodes than microbatches."""
    gpus = 0 if train.device == "cpu" else gpus_here()
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if not gpus and train.device != "cpu" and allocated.isdigit() and int(allocated):
        raise UserError(
            f"Slurm gave {allocated} GPUs of {platform.node()} to this job, but torch finds none there; install a "
            f"torch that fits the driver, or use train.device=cpu"
        )
    if nodes > train.microbatches:
        raise UserError(
            f"train.microbatches = {train.microbatches} gives work to at most {train.microbatches} ranks, but the job "
            f"has {nodes} nodes; ask for fewer, or raise train.microbatches"
        )
    return ranks_per_node(train.microbatches, gpus or max(1, cpus // train.threads), nodes)


def start_ranks(arguments: Sequence[str], per_node: int, node: JobNode, endpoint: str = "") -> list[str]:
    """The command that starts this node's ranks: torchrun, which listens on all addresses, only for several ranks.
    arguments: of dist_train.main. endpoint: HOST:PORT on the first node, needed where there are several."""
    if node.nodes == per_node == 1:
        return [sys.executable, "-m", "dist_train.main", *arguments]
    if node.nodes == 1:
        rendezvous = ["--standalone", "--local-addr=127.0.0.1"]  # the machine's own name may not resolve
    else:
        host, _, port = endpoint.rpartition(":")
        rendezvous = [f"--nnodes={node.nodes}", f"--node-rank={node.index}"]
        rendezvous += [f"--master-addr={host}", f"--master-port={port}"]
    agent = [sys.executable, "-m", "dist_train.launch.agent", *rendezvous, f"--nproc-per-node={per_node}"]
    return [*agent, "-m", "dist_train.main", *arguments]


@dataclass
class Training:
    """One training; each node of a job runs its ranks. submitit pickles the object, calls it, and calls `checkpoint` on
    the first node when the job is to stop.

    arguments: of dist_train.main. run_dir: overrides theirs; %j in it stands for the job, %A for an array of jobs.
    group: whether the parent folder holds a group of runs, whose name is W&B's group and which has their table.
    """

    arguments: list[str]
    run_dir: Path
    group: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    stopping: bool = False

    def __call__(self) -> str:
        """Train. Returns the run folder when the training is done, and otherwise exits with its exit code."""
        code = self.run()
        if code == PREEMPTED:  # submitit requeues the job from `checkpoint` on the first node
            time.sleep(_REQUEUED)
        if code:
            sys.exit(code)  # no exception, whose traceback would hide the failed rank's message
        return str(self.run_dir)

    def run(self) -> int:
        """Train until the run is done or stopped. Returns the exit code."""
        ignore_at_exit()
        try:
            return self._run()
        except UserError as error:
            say(str(error))
            return BAD_INPUT

    def _run(self) -> int:
        node = current_node()
        self.run_dir = Path(_with_job_id(str(self.run_dir))).absolute()
        _, settings = resolve(parser().parse_intermixed_args(self.arguments))
        per_node = local_ranks(settings.train, node.nodes, node.cpus)
        endpoint = self._meet(node) if node.nodes > 1 else ""
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.train.threads))
        if self.group:
            os.environ.setdefault("WANDB_RUN_GROUP", self.run_dir.parent.name)
            for name in ("WANDB_NAME", "WANDB_RUN_ID"):  # each member has its own
                os.environ.pop(name, None)
        arguments = [*self.arguments, "--run-dir", str(self.run_dir)]  # overrides an earlier --run-dir
        known = len(read_history(self.run_dir))
        code = FAILED
        if not self.stopping:
            words = start_ranks(arguments, per_node, node, endpoint)
            self.process = subprocess.Popen(words, env=without_launcher())
            if self.stopping:  # since the check above
                self.stop()
            while not self._ended():
                time.sleep(0.1)
            code = self.process.wait()
            if code == BAD_INPUT:
                return code
            if code < 0 and not self.stopping:
                say(f"the training (process {self.process.pid}) was ended by {signal.Signals(-code).name}")
        if code != DONE:  # from the history: a late signal may have ended torchrun after its ranks had finished
            code = code_of(_outcome(self.run_dir, known, self.stopping))
        if code == DONE and node.main and self.group:
            try:
                text, damaged = table.write(self.run_dir.parent)
                show(*text.split("\n"))
                for each in damaged:
                    say(str(each))
            except UserError as error:  # of the group; this training is done
                say(f"no table: {error}")
        return code

    def stop(self) -> None:
        """Have the ranks finish their step, save and exit, and wait for that. Safe in a signal handler."""
        self.stopping = True
        if self.process is not None and not self._ended():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)  # not Popen.send_signal, which polls
            while not self._ended():
                time.sleep(0.1)

    def checkpoint(self) -> Any:
        """submitit's protocol: stop, and return what the requeued job is to run."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(Training(self.arguments, self.run_dir, self.group))

    def _ended(self) -> bool:
        """Whether the ranks, or their torchrun, have ended."""
        # not Popen.poll: its lock would deadlock in a signal handler that interrupted it
        assert self.process is not None
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _meet(self, node: JobNode) -> str:
        """HOST:PORT of the rendezvous, which the first node chooses and writes to a file in the run folder; "" after a
        stop signal. Raises UserError when this node does not see that file."""
        folder = self.run_dir / layout.MEETINGS
        path = folder / node.start
        if node.main:
            with socket.socket() as free:
                free.bind(("", 0))
                endpoint = f"{os.environ.get('SLURMD_NODENAME', platform.node())}:{free.getsockname()[1]}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, endpoint.encode())
            except OSError as error:
                raise UserError(
                    f"--run-dir {self.run_dir}: cannot be written ({error.strerror}); name another folder"
                ) from None
            return endpoint
        deadline = time.monotonic() + _MEET
        while time.monotonic() < deadline and not self.stopping:
            # list the folder: a network file system may cache that `path` does not exist, but not the listing
            if folder.is_dir() and path in folder.iterdir():
                return path.read_text(encoding="utf-8")
            time.sleep(0.5)
        if self.stopping:
            return ""
        raise UserError(
            f"--run-dir {self.run_dir}: {platform.node()} does not see the file that the job's first node wrote there; "
            f"name a folder on a file system that all nodes share"
        )


def as_name(text: str) -> str:
    """The text as a file name: letters, digits and dots are kept, anything else becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9.]", "_", text)


def _with_job_id(path: str) -> str:
    """The path with the job's number in place of %j and %A."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID") or "alone"
    return path.replace("%j", job).replace("%A", job)


def _outcome(run_dir: Path, known: int, stopping: bool) -> str:
    """How a training has ended, `done`, `preempted` or `failed`, from the lines of its history after the first `known`.
    Without a new line, a run that was asked to stop was so before it began, and counts as preempted. torchrun's exit
    code only tells that it failed, and rank 0 may be on another node."""
    deadline = time.monotonic() + _END
    while True:
        events = read_history(run_dir)[known:]
        if events and events[-1]["event"] == "end":
            return str(events[-1]["outcome"])
        if not events and stopping:
            return "preempted"
        if time.monotonic() > deadline:
            return "failed"
        time.sleep(0.2)


def _member() -> tuple[Path, list[str]]:
    """The run folder and the settings of a job without --run-dir, from Slurm's variables: the index in a job array is
    the seed."""
    name = as_name(os.environ.get("SLURM_JOB_NAME", "train"))
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        seed = os.environ["SLURM_ARRAY_TASK_ID"]
        return Path("runs") / f"{name}-%A" / f"seed{seed}", [f"train.seed={seed}"]
    return Path("runs") / f"{name}-%j", []


def _requeue(run_dir: Path, step: int, received: Sequence[int]) -> bool:
    """Requeue this job, unless it was cancelled. step: of the newest checkpoint when it started. received: the stop
    signals. Returns whether the job will run again."""
    job, restarts = os.environ["SLURM_JOB_ID"], _restarts()
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # the last member to start has the number of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if restarts >= _WITHOUT_PROGRESS and _newest(run_dir) == step:
        say(f"job {job} was started {restarts + 1} times, the last without progress; it is not requeued")
        return False
    again = f"submit it again with {shlex.join(['--run-dir', str(run_dir)])}"
    if not shutil.which("scontrol"):  # in a container, say
        say(f"job {job} could not be requeued (no scontrol in PATH); {again}")
        return False
    shown = cluster.show_job(job)
    # SIGTERM alone, without a preemption, is from srun, which ends all nodes when one has failed
    failed = {*received} == {signal.SIGTERM} and " PreemptTime=None " in shown.stdout
    if " JobState=RUNNING " not in shown.stdout or failed:
        return False
    done = cluster.answer("scontrol", "requeue", job)
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip()
        say(f"job {job} could not be requeued ({reason}); {again}")
        return False
    return True


def _newest(run_dir: Path) -> int:
    return max(Run(run_dir).checkpoints, default=0)


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command on one node of a job. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_intermixed_args(arguments)
    run_dir, extra = (given.run_dir, []) if given.run_dir else _member()
    training = Training([*arguments, *extra], run_dir, group="SLURM_ARRAY_TASK_ID" in os.environ)
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        if len(received) == 1:  # stop() returns only when the ranks have ended
            training.stop()

    for number in SIGNALS:
        signal.signal(number, stop)
    this_node = current_node()
    step = _newest(Path(_with_job_id(str(run_dir))))
    if this_node.main:
        show(f"node {platform.node()}: {shlex.join(['dist_train.main', *training.arguments])}")
    code = training.run()
    slurm = "SLURM_JOB_ID" in os.environ and received[:1] not in ([signal.SIGINT], [signal.SIGHUP])  # of a terminal
    # the first node requeues the job; the other nodes wait for that, since srun ends all nodes when one exits
    if code == PREEMPTED and slurm and (not this_node.main or _requeue(training.run_dir, step, received)):
        time.sleep(_REQUEUED)
    return code


if __name__ == "__main__":
    survive_output()
    sys.exit(main())
