"""A Slurm cluster on this machine: munge, slurmctld, and a slurmd for each of several virtual nodes.

A node is a slurmd with its own host name, hosts file and process ids (namespaces, which need root). Its GPUs are
declared to Slurm, but do not exist.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "unshare")
NODES = ("n1", "n2", "n3", "n4", "g1")
_CONF = """
ClusterName=lab
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={at}/state
SlurmctldPidFile={at}/slurmctld.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdPidFile={at}/slurmd.%n.pid
SlurmdLogFile={at}/slurmd.%n.log
SlurmdSpoolDir={at}/spool.%n
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=0
KillWait=15
MinJobAge=7200
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
NodeName=n[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=4000
NodeName=g1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={gpu} CPUs=1 RealMemory=4000 Gres=gpu:2
NodeName=far1 NodeAddr=192.0.2.1 Port={first} CPUs=1 RealMemory=4000 State=DOWN
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n[1-4] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=g1 MaxTime=60 State=UP
PartitionName=far Nodes=far1 MaxTime=60 State=UP
"""


def missing() -> str:
    """The reason why no cluster can be started on this machine, "" if one can."""
    if os.geteuid() != 0:
        return "a virtual Slurm cluster needs root"
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    if lacking:
        return f"no Slurm here ({', '.join(lacking)}); install slurmctld, slurmd, slurm-client and munge"
    if subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], check=False).returncode:
        return "no namespaces for virtual nodes here"
    return ""


class Cluster:
    """A context in which the cluster runs. environment: variables for Slurm's commands."""

    def __init__(self) -> None:
        self.at = Path(tempfile.mkdtemp(prefix="slurm"))  # paths of sockets must be short
        self.environment = {**os.environ, "SLURM_CONF": str(self.at / "slurm.conf")}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        at = self.at
        at.chmod(0o711)
        for folder in ("state", *(f"spool.{node}" for node in NODES)):
            (at / folder).mkdir()
        (at / "munge.key").write_bytes(os.urandom(128))
        (at / "munge.key").chmod(0o600)
        for device in ("gpu0", "gpu1"):
            os.mknod(at / device, 0o20666, os.makedev(1, 3))
        (at / "gres.conf").write_text(f"NodeName=g1 Name=gpu File={at}/gpu[0-1]\n")
        port = _free_ports(1 + len(NODES))
        last = port + len(NODES) - 1
        conf = _CONF.format(at=at, port=port, first=port + 1, last=last, gpu=last + 1)
        (at / "slurm.conf").write_text(conf)
        names = "".join(f"127.0.1.{number} {node}\n" for number, node in enumerate(NODES, 1))
        (at / "hosts").write_text(f"127.0.0.1 localhost {os.uname().nodename}\n{names}")
        munged = [f"--{kind}-file={at}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._daemon(["munged", "--force", *munged, f"--socket={at}/munge.socket"])
        self._daemon(["slurmctld", "-c"])
        for node in NODES:
            self.power_on(node)
        self.wait(self._idle, "the nodes to be idle")

    def _daemon(self, command: Sequence[str]) -> None:
        subprocess.run(command, check=True, env=self.environment, start_new_session=True)

    def power_on(self, node: str) -> None:
        """Start a node's slurmd in new namespaces."""
        inside = f"hostname {node} && mount --bind {self.at}/hosts /etc/hosts && slurmd -D -N {node} & wait"
        namespaces = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._nodes[node] = subprocess.Popen(
            ["unshare", *namespaces, "bash", "-c", inside],
            env=self.environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def power_off(self, node: str) -> None:
        """Kill all processes of a node, and set it down in Slurm, which would detect it only after SlurmdTimeout."""
        self._nodes[node].kill()
        self._nodes.pop(node).wait()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def close(self) -> None:
        if (self.at / "slurmctld.pid").exists():
            with contextlib.suppress(subprocess.CalledProcessError):
                self.run("scancel", "--user=root")
                self.wait(lambda: not self.run("squeue", "--noheader"), "the queue to be empty", 30, quietly=True)
        for process in self._nodes.values():
            process.kill()
            process.wait()
        for pid in self.at.glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(self.at, ignore_errors=True)

    def run(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        """Run a command, and return what it prints. Raises CalledProcessError."""
        environment = {**self.environment, **variables}
        done = subprocess.run(
            [*map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            done.check_returncode()
        return done.stdout.strip()

    def _idle(self) -> bool:
        asked = ["sinfo", "--noheader", "--Node", "--partition=main,gpu", "--format=%T"]
        done = subprocess.run(asked, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.split().count("idle") == len(NODES)  # sinfo fails until slurmctld has started

    def job(self, job: str) -> dict[str, str]:
        """Slurm's properties of a job: JobState, NodeList, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job, "--oneliner")))

    def nodes(self, job: str) -> list[str]:
        """The names of a job's nodes, also after its end."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def ended(self, job: str, timeout: float = 180) -> str:
        """Wait for a job's end, at most `timeout` seconds. Returns its state."""
        ends = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
        self.wait(lambda: self.state(job) in ends, f"the end of job {job}", timeout)
        return self.state(job)

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 60, quietly: bool = False) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                if quietly:
                    return
                queue = self.run("squeue", "--format=%i %P %j %T %R")
                raise TimeoutError(f"waited {timeout:g} s for {what}; the queue:\n{queue}")
            time.sleep(0.3)


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(16817, 32768, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return first
    raise OSError("no ports are free")
