"""The Slurm cluster: the options in slurm/train.sh, the partitions and their nodes, and the states of jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "train.sh"  # in the repository, or in the installed package
_SHORT = {"A": "account", "C": "constraint", "J": "job-name", "N": "nodes", "c": "cpus-per-task", "p": "partition"}
_SHORT |= {"q": "qos", "t": "time", "w": "nodelist", "x": "exclude"}
_OPTION = re.compile(r"#SBATCH\s+(?:--(?P<long>[a-z-]+)|-(?P<short>\w))(?:[=\s]\s*(?P<value>[^\s#]\S*))?\s*(?:#.*)?")
# file systems of local disks, which no other machine sees; shared ones are nfs, lustre, gpfs, beegfs, ceph, wekafs, ...
_LOCAL_DISKS = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


def used_script() -> Path:
    """The script with the options and the set-up of jobs: slurm/train.sh in the current folder, or else the installed
    one, which users should not have to edit."""
    own = Path("slurm") / "train.sh"
    return own if own.is_file() else SCRIPT


def options(script: Path | None = None) -> dict[str, str | bool]:
    """The #SBATCH options of a script by their long names; True for one without a value. script: used_script() unless
    given. Raises UserError."""
    script = script or used_script()
    values: dict[str, str | bool] = {}
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.startswith("#SBATCH"):
            match = _OPTION.fullmatch(line.strip())
            name = match and (match["long"] or _SHORT.get(match["short"]))
            if not match or not name:
                raise UserError(f"{script}: {line}: cannot be read; write it as #SBATCH --name=value")
            values[name] = match["value"] or True
    return values


def set_up(script: Path | None = None) -> list[str]:
    """A script's lines between "# set-up" and "# end of set-up". Raises UserError."""
    script = script or used_script()
    lines = script.read_text(encoding="utf-8").splitlines()
    first = [number for number, line in enumerate(lines) if line.startswith("# set-up")]
    last = [number for number, line in enumerate(lines) if line.startswith("# end of set-up")]
    if len(first) != 1 or len(last) != 1:
        raise UserError(f"{script}: its set-up is between a line # set-up and a line # end of set-up; put them back")
    return lines[first[0] + 1 : last[0]]


def minutes(time: str) -> int:
    """A time limit as Slurm writes it (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in whole minutes. Raises UserError."""
    number = "([0-9]{1,7})"
    match = re.fullmatch(f"(?:{number}-)?{number}(?::{number})?(?::{number})?", time)
    if not match:
        raise UserError(f"--time {time}: not a time limit; write it as minutes, H:M:S or D-H:M:S")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, (mins, seconds) = 0, [*numbers, 0][:2]
    return 60 * (24 * int(days or 0) + hours) + mins + (seconds > 0)


@dataclass(frozen=True)
class Node:
    """A node of a partition. address: host name or IP address. limit: minutes that the partition allows, 0 for any."""

    name: str
    address: str
    gpus: int
    cpus: int
    limit: int


def partitions() -> dict[str, list[Node]]:
    """The nodes of every partition; those of the default partition also under "". Raises UserError without Slurm, and
    when it does not answer."""
    if missing := [program for program in ("sbatch", "sinfo", "scontrol") if not shutil.which(program)]:
        raise UserError(
            f"there is no Slurm on this machine (no {missing[0]} in PATH); log in to a node of the cluster, or train "
            f"on this machine with --local"
        )
    sinfo = ["sinfo", "--noheader", "--Node", "--format=%P|%N|%o|%G|%c|%l"]
    done = answer(*sinfo)
    if done.returncode:
        reason = ["no reason given", *done.stderr.splitlines()][-1]
        raise UserError(f"Slurm does not answer ({reason}); ask its administrator, or use --local")
    nodes: dict[str, list[Node]] = {}
    for line in done.stdout.splitlines():
        partition, name, address, gres, cpus, limit = line.split("|")
        # gres is such as gpu:4, gpu:a100:4(S:0-1) or (null)
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))
        node = Node(name, address, gpus, int(cpus), 0 if limit == "infinite" else minutes(limit))
        nodes.setdefault(partition.rstrip("*"), []).append(node)
        if partition.endswith("*"):
            nodes.setdefault("", []).append(node)
    return nodes


def check(partition: str, nodes: int, gpus: int, cpus: int, time: int) -> list[Node]:
    """The nodes of a partition ("" for the default one). Raises UserError when it does not have as many nodes, with as
    many GPUs and CPUs each (0 for any), or does not allow that time in minutes."""
    known = partitions()
    names = ", ".join(sorted(name for name in known if name))
    if partition not in known:
        if not partition:
            raise UserError(f"this cluster has no default partition; choose one of {names} with --partition")
        raise UserError(f"--partition {partition}: there is no such partition; choose one of {names}")
    members = known[partition]
    label = f"partition {partition}" if partition else "the default partition"
    if nodes > len(members):
        raise UserError(f"--nodes {nodes}: {label} has {len(members)} nodes; ask for fewer, or for another partition")
    if gpus > (most := max(node.gpus for node in members)):
        raise UserError(
            f"--gpus-per-node {gpus}: a node of {label} has {most} GPUs; ask for fewer on more nodes, or for another "
            f"partition"
        )
    if cpus > (most := max(node.cpus for node in members)):
        raise UserError(f"--cpus-per-task {cpus}: a node of {label} has {most} CPUs; ask for fewer")
    if time > (most := max(node.limit or time for node in members)):
        raise UserError(
            f"--time {time} minutes: {label} allows {most}; ask for less: at its limit a job is saved, and resumed"
        )
    return members


def check_shared(folder: Path, nodes: Sequence[Node]) -> None:
    """Raises UserError when `folder` is on a local disk of this machine, and one of the nodes is another machine."""
    own_names = _own_names()
    elsewhere = [node for node in nodes if node.address not in own_names and not node.address.startswith("127.")]
    kind = _file_system(folder)
    if elsewhere and kind in _LOCAL_DISKS:
        raise UserError(
            f"--run-dir {folder} is on a disk of this machine ({kind}), which {elsewhere[0].name} does not see; name a "
            f"folder on a file system that all nodes share"
        )


def _own_names() -> set[str]:
    """The names and addresses of this machine."""
    addresses = answer("hostname", "--all-ip-addresses").stdout.split()
    return {os.uname().nodename, os.uname().nodename.split(".")[0], "localhost", *addresses}


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, or would be created on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    folder, best, kind = folder.resolve(), Path(), ""
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, escaped, mounted, *_ = line.split(" ")
        mount = Path(escaped.encode().decode("unicode_escape"))  # a space is written \040
        if (folder == mount or mount in folder.parents) and len(mount.parts) >= len(best.parts):
            best, kind = mount, mounted
    return kind


def answer(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Returns its exit code, and what it printed as text. Raises FileNotFoundError."""
    return subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)


def show_job(job: str) -> subprocess.CompletedProcess[str]:
    """What scontrol says of a job, in one line. Raises FileNotFoundError."""
    return answer("scontrol", "show", "job", job, "--oneliner")


def state(job: str) -> str:
    """The state of a job in Slurm's terms; "" for a job that Slurm does not know, UNKNOWN while it does not answer."""
    shown = show_job(job)
    if match := re.search(r"\bJobState=(\w+)", shown.stdout):
        return match[1]
    if not re.search("not found|Invalid job id", shown.stdout + shown.stderr):
        return "UNKNOWN"
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}"]
    try:
        states = answer(*sacct).stdout.split()
    except FileNotFoundError:
        states = []
    return states[0] if states else ""
