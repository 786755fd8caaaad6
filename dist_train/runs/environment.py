"""What the bits of a run depend on besides its configuration: the software, the device, the code."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_nccl_available

from dist_train import __version__

Environment = dict[str, str]
_PACKAGE = Path(__file__).parent.parent
_TRAINING = ("config", "data", "distributed", "model", "runs", "training")  # packages that a training runs


def environment(device: torch.device) -> Environment:
    """What may change the bits of a run that is resumed on another machine, as short texts by name."""
    common = {
        "torch": str(torch.__version__),
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "code": code_digest(),
    }
    if device.type == "cuda":
        return {**common, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {**common, "instructions": torch.backends.cpu.get_cpu_capability()}


def machine(device: torch.device) -> dict[str, str | int]:
    """Where a rank computes: its host, the bytes of memory of its device and, of a GPU, the UUID and the versions that
    do not change bits. None of it tells whether a run has the same bits."""
    here: dict[str, str | int] = {"host": platform.node()}
    if device.type != "cuda":
        return {**here, "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    found: Any = torch.cuda.get_device_properties(device)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if is_nccl_available() else "none"
    return {**here, "memory": found.total_memory, "uuid": str(found.uuid), "nccl": nccl, "driver": _driver()}


def _driver() -> str:
    """The version of NVIDIA's driver, "unknown" where it is another's."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    version = re.search(r"\d+\.\d+(\.\d+)?", text)
    return version[0] if version else "unknown"


def merged(environments: Sequence[Environment]) -> Environment:
    """The environment of a run from those of its ranks: by name the value, or all values where they differ."""
    return {name: " and ".join(values) for name, values in _values(environments).items()}


def mixture(environments: Sequence[Environment]) -> str:
    """In what the ranks differ, in words; "" where they do not. environments: by rank."""
    return ", ".join(
        f"{name} ({', '.join(f'{value} on {_counted(ranks)}' for value, ranks in values.items())})"
        for name, values in _values(environments).items()
        if len(values) > 1
    )


def _counted(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")


def _values(environments: Sequence[Environment]) -> dict[str, dict[str, list[int]]]:
    """{name: {value: the ranks that have it}}."""
    found: dict[str, dict[str, list[int]]] = {}
    for name in dict.fromkeys(name for each in environments for name in each):
        for rank, each in enumerate(environments):
            found.setdefault(name, {}).setdefault(each.get(name, "none"), []).append(rank)
    return found


def changes(before: Environment, now: Environment) -> dict[str, list[str]]:
    """{name: [before, now]} of all that differs between two environments."""
    pairs = {name: [before.get(name, "none"), now.get(name, "none")] for name in {**before, **now}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def versions() -> dict[str, Any]:
    """Versions of Python, this package, its dependencies and CUDA; None for those that are not installed."""
    packages = ("torch", "torchvision", "ffcv", "numpy", "wandb")
    return {
        "python": platform.python_version(),
        "dist_train": __version__,
        **{package: _installed(package) for package in packages},
        "cuda": torch.version.cuda,
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def code_digest() -> str:
    """A digest of the source files that a training runs, eight hexadecimal digits."""
    digest = hashlib.sha256()
    for folder in (_PACKAGE, *(_PACKAGE / name for name in _TRAINING)):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def git_commit() -> str | None:
    """The git commit of this code, followed by + when tracked files differ from it; None outside a repository of this
    code, also where it is installed into the working tree of another project."""
    git = ["git", "-C", str(_PACKAGE)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, encoding="utf-8", errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed.stdout.strip() else "")
