"""The Slurm cluster around this machine: what slurm/train.sh says of it, what it has, and how its jobs are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import UserError

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "train.sh"  # the repository's, or the installed package's
_SHORT = {"A": "account", "C": "constraint", "J": "job-name", "N": "nodes", "c": "cpus-per-task", "p": "partition"}
_SHORT |= {"q": "qos", "t": "time", "w": "nodelist", "x": "exclude"}
_OPTION = re.compile(r"#SBATCH\s+(?:--(?P<long>[a-z-]+)|-(?P<short>\w))(?:[=\s]\s*(?P<value>[^\s#]\S*))?\s*(?:#.*)?")
# of disks that no other machine sees; those of clusters are nfs, lustre, gpfs, beegfs, ceph, wekafs, ...
_LOCAL_DISKS = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


def used_script() -> Path:
    """The script that jobs take their options and their set-up from: slurm/train.sh of the current folder, where there
    is one, because nobody should edit an installed package."""
    own = Path("slurm") / "train.sh"
    return own if own.is_file() else SCRIPT


def options(script: Path | None = None) -> dict[str, str | bool]:
    """The #SBATCH lines of a script, the used one unless given, by long name; True for an option without a value.
    Raises UserError."""
    script = script or used_script()
    found: dict[str, str | bool] = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            match = _OPTION.fullmatch(line.strip())
            name = match and (match["long"] or _SHORT.get(match["short"]))
            if not match or not name:
                raise UserError(f"{script}: {line}: cannot be read; write it as #SBATCH --name=value")
            found[name] = match["value"] or True
    return found


def set_up(script: Path | None = None) -> list[str]:
    """A script's lines between "# set-up" and "# end of set-up". Raises UserError."""
    script = script or used_script()
    lines = script.read_text().splitlines()
    first = [number for number, line in enumerate(lines) if line.startswith("# set-up")]
    last = [number for number, line in enumerate(lines) if line.startswith("# end of set-up")]
    if len(first) != 1 or len(last) != 1:
        raise UserError(f"{script}: its set-up is between a line # set-up and a line # end of set-up; put them back")
    return lines[first[0] + 1 : last[0]]


def minutes(time: str) -> int:
    """A time limit as Slurm writes it (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in whole minutes. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(f"--time {time}: not a time limit of Slurm's; write it as minutes, H:M:S or D-H:M:S")
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, mins, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, mins, seconds = given
    else:
        hours, (mins, seconds) = 0, [*given, 0][:2]
    return 60 * (24 * int(days or 0) + hours) + mins + (seconds > 0)


@dataclass(frozen=True)
class Node:
    """A node of a partition. address: where Slurm finds it. limit: minutes that the partition allows, 0 for any."""

    name: str
    address: str
    gpus: int
    cpus: int
    limit: int


def partitions() -> dict[str, list[Node]]:
    """The nodes of every partition, the default one's also under "". Raises UserError without a Slurm."""
    if not shutil.which("sbatch"):
        raise UserError(
            "there is no Slurm here (no sbatch in PATH); log in to a node of the cluster, or train on this machine "
            "with --local"
        )
    asked = ["sinfo", "--noheader", "--Node", "--format=%P|%N|%o|%G|%c|%l"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = ["no reason given", *done.stderr.splitlines()][-1]
        raise UserError(f"Slurm does not answer ({reason}); ask its administrator, or use --local")
    found: dict[str, list[Node]] = {}
    for line in done.stdout.splitlines():
        partition, name, address, gres, cpus, limit = line.split("|")
        # gpu:4, gpu:a100:4(S:0-1), (null)
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))
        node = Node(name, address, gpus, int(cpus), 0 if limit == "infinite" else minutes(limit))
        found.setdefault(partition.rstrip("*"), []).append(node)
        if partition.endswith("*"):
            found.setdefault("", []).append(node)
    return found


def check(partition: str, nodes: int, gpus: int, cpus: int, time: int) -> list[Node]:
    """Whether the partition ("" for the default) has such nodes. gpus, cpus: of each; 0 for any. time: minutes.
    Returns its nodes. Raises UserError."""
    known = partitions()
    names = ", ".join(sorted(name for name in known if name))
    if partition not in known:
        if not partition:
            raise UserError(f"this cluster has no default partition; choose one of {names} with --partition")
        raise UserError(f"--partition {partition}: there is no such partition; there are {names}")
    there = known[partition]
    where = f"partition {partition}" if partition else "the default partition"
    if nodes > len(there):
        raise UserError(f"--nodes {nodes}: {where} has {len(there)} nodes; ask for fewer, or for another partition")
    if gpus > (most := max(node.gpus for node in there)):
        raise UserError(
            f"--gpus-per-node {gpus}: a node of {where} has {most} GPUs; ask for fewer on more nodes, or for another "
            f"partition"
        )
    if cpus > (most := max(node.cpus for node in there)):
        raise UserError(f"--cpus-per-task {cpus}: a node of {where} has {most} CPUs; ask for fewer")
    if time > (most := max(node.limit or time for node in there)):
        raise UserError(
            f"--time {time} minutes: {where} allows {most}; ask for less: at its limit a job is saved, and goes on"
        )
    return there


def check_shared(folder: Path, nodes: Sequence[Node]) -> None:
    """Raises UserError when `folder` is on a disk of this machine's, and one of the nodes is another machine."""
    mine = _own_names()
    elsewhere = [node for node in nodes if node.address not in mine and not node.address.startswith("127.")]
    kind = _file_system(folder)
    if elsewhere and kind in _LOCAL_DISKS:
        raise UserError(
            f"--run-dir {folder} is on a disk of this machine ({kind}), which {elsewhere[0].name} does not see; name a "
            f"folder on a file system that all nodes share"
        )


def _own_names() -> set[str]:
    """The names and addresses of this machine."""
    shown = subprocess.run(["hostname", "--all-ip-addresses"], capture_output=True, text=True, check=False).stdout
    return {os.uname().nodename, os.uname().nodename.split(".")[0], "localhost", *shown.split()}


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder, which need not be there yet, is or would be on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    folder, best, kind = folder.resolve(), Path(), ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, found, *_ = line.split(" ")
        at = Path(point.encode().decode("unicode_escape"))  # a blank in it is written \040
        if (folder == at or at in folder.parents) and len(at.parts) >= len(best.parts):
            best, kind = at, found
    return kind


def state(job: str) -> str:
    """A job's state in Slurm's words, "" for one that Slurm no longer knows, UNKNOWN while Slurm does not answer."""
    shown = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=False)
    if match := re.search(r"\bJobState=(\w+)", shown.stdout):
        return match[1]
    if not re.search("not found|Invalid job id", shown.stdout + shown.stderr):
        return "UNKNOWN"
    asked = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}"]
    try:
        known = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        known = []
    return known[0] if known else ""
