"""What the bits of a run depend on besides its configuration: the software, the device, the code."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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
