"""Runs the tests on other versions of Python and of the packages than the locked ones.

    bash tests/versions.sh                        # every environment: the table for benchmarks/RESULTS.md
    bash tests/versions.sh lowest newest          # some of them
    bash tests/versions.sh lowest -- -k config    # part of the tests
    bash tests/versions.sh --airbench DIR         # with the time of block94 beside a clone of cifar10-airbench
    bash tests/versions.sh --renew                # a new launch/lock.txt, if the tests pass on it

Environments, created again under build/versions/ each time: `lowest` has the lowest versions that pyproject.toml
allows, on the oldest Python of this machine, and `newest` the newest, on the newest Python. `locked-3.11` and the like
have those of launch/lock.txt, one for each Python, and `without-ffcv` has them without ffcv. The Pythons are those in
PATH and in pyenv. The benchmark runs in `lowest` and `newest`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENTS = REPOSITORY / "build" / "versions"
LOCK = REPOSITORY / "launch" / "lock.txt"
OLDEST = (3, 10)
SHOWN = ("torch", "torchvision", "numpy", "ffcv")
HEADER = "# The versions that launch/setup.sh installs. To renew them: bash tests/versions.sh --renew\n"
UV = str(Path(sys.executable).with_name("uv"))

Python = tuple[int, int]


@dataclass(frozen=True)
class Environment:
    """A Python, how uv chooses the versions of the packages, and which extras are installed.

    lock: a file of versions, or None. resolution: of uv, where there is no lock.
    """

    name: str
    python: Python
    lock: Path | None = LOCK
    resolution: str = "highest"
    extras: str = "dev,ffcv"


@dataclass(frozen=True)
class Result:
    """The result of the tests in an environment. versions: of SHOWN. minutes: of the tests alone. speed: the last line
    of the benchmark's output."""

    environment: Environment
    versions: dict[str, str]
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    minutes: float = 0
    speed: str = ""


def pythons() -> dict[Python, Path]:
    """Every CPython of version OLDEST or newer in PATH or pyenv that starts."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders += sorted((root / "versions").glob("*/bin"))
    found: dict[Python, Path] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("python3.*"))):
        match = re.fullmatch(r"python3\.(\d+)", path.name)
        version = (3, int(match[1])) if match else (0, 0)
        if version >= OLDEST and version not in found and _starts(path):
            found[version] = path
    return dict(sorted(found.items()))


def _starts(path: Path) -> bool:
    try:
        done = subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def environments(there: list[Python]) -> dict[str, Environment]:
    """The environments by name, `lowest` and `newest` first."""
    locked = [Environment(f"locked-{_dotted(python)}", python) for python in there]
    mine = (sys.version_info[0], sys.version_info[1])  # the Python of the environment that set-up made
    every = [
        Environment("lowest", there[0], None, "lowest-direct"),
        Environment("newest", there[-1], None),
        *locked,
        Environment("without-ffcv", mine if mine in there else there[-1], extras="dev"),
    ]
    return {environment.name: environment for environment in every}


def _dotted(python: Python) -> str:
    return ".".join(map(str, python))


def make(environment: Environment, python: Path) -> Path:
    """Create an environment again. Returns its Python. Raises CalledProcessError, after uv's message."""
    folder = ENVIRONMENTS / environment.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    own = folder / "bin" / "python"
    versions = environment.lock
    if versions is None:
        versions = folder / "versions.txt"
        extras = [word for extra in environment.extras.split(",") for word in ("--extra", extra)]
        choice = ["--resolution", environment.resolution, "--python", str(own), *extras, "pyproject.toml"]
        subprocess.run([UV, "pip", "compile", "-q", *choice, "-o", str(versions)], cwd=REPOSITORY, check=True)
    wanted = ["--compile-bytecode", "-e", f".[{environment.extras}]", "-c", str(versions)]
    subprocess.run([UV, "pip", "install", "-q", "--python", str(own), *wanted], cwd=REPOSITORY, check=True)
    return own


def check(environment: Environment, python: Path, arguments: list[str], speed: list[str]) -> Result:
    """Create the environment, and run the tests in it, and the benchmark unless `speed` is empty."""
    print(f"versions: {environment.name} on Python {_dotted(environment.python)}", file=sys.stderr, flush=True)
    own = make(environment, python)
    asked = [str(own), "-c", f"from importlib.metadata import version as v; print(*map(v, {_installed(environment)}))"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    versions = dict(zip(_installed(environment), told, strict=True))
    path = f"{own.parent}{os.pathsep}{os.environ['PATH']}"
    report = own.parent.parent / "tests.xml"
    command = [str(own), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    command += [f"--junitxml={report}", *arguments]
    start = time.monotonic()
    variables = {**os.environ, "PATH": path}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile this project again
    subprocess.run(command, cwd=REPOSITORY, env=variables, check=False)
    minutes = (time.monotonic() - start) / 60
    if not report.exists():
        return Result(environment, versions, failed=1, minutes=minutes)
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    tests, failures, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    measured = ""
    if speed:
        done = subprocess.run([str(own), *speed], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
        measured = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "failed"
    failed = failures + errors
    return Result(environment, versions, tests - failed - skipped, failed, skipped, minutes, measured)


def _installed(environment: Environment) -> tuple[str, ...]:
    return tuple(name for name in SHOWN if name != "ffcv" or "ffcv" in environment.extras)


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    rows = [
        "| environment | Python | " + " | ".join(SHOWN) + " | passed | failed | skipped | minutes | speed |",
        "| --- " * (7 + len(SHOWN)) + "|",
    ]
    for r in results:
        shown = " | ".join(r.versions.get(name, "none") for name in SHOWN)
        counts = f"{r.passed} | {r.failed} | {r.skipped} | {r.minutes:.0f}"
        python = _dotted(r.environment.python)
        rows.append(f"| {r.environment.name} | {python} | {shown} | {counts} | {r.speed or 'not measured'} |")
    return "\n".join(rows)


def renewed() -> str:
    """The content of a new launch/lock.txt: the newest versions that pyproject.toml allows, for all Pythons and
    platforms."""
    choice = ["--universal", "--python-version", _dotted(OLDEST), "--all-extras", "--no-header", "pyproject.toml"]
    done = subprocess.run(
        [UV, "pip", "compile", "-q", *choice], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    return HEADER + done.stdout


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 when all tests passed in all environments."""
    words = sys.argv[1:] if arguments is None else arguments
    place = words.index("--") if "--" in words else len(words)
    mine, for_pytest = words[:place], words[place + 1 :]
    there = pythons()
    known = environments([*there])
    parser = argparse.ArgumentParser(
        prog="bash tests/versions.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--renew", action="store_true", help="write launch/lock.txt anew if the tests pass on it")
    parser.add_argument("--no-speed", action="store_true", help="do not run the benchmark on the two ends")
    parser.add_argument("--airbench", metavar="DIR", help="a clone of cifar10-airbench to run the benchmark beside")
    args = parser.parse_args(mine)
    if unknown := [name for name in args.environments if name not in known]:
        parser.error(f"{unknown[0]}: there is no such environment; choose of {', '.join(known)}")
    chosen = [known[name] for name in args.environments or known]
    if args.renew:
        new = ENVIRONMENTS / "lock.txt"
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(renewed())
        chosen = [Environment("renewed", known["without-ffcv"].python, new)]
    peer = ["--airbench", str(Path(args.airbench).resolve())] if args.airbench else []
    results = []
    for environment in chosen:
        ends = environment.name in ("lowest", "newest") and not args.no_speed
        speed = ["-m", "benchmarks.speed", "--short", *peer] if ends else []
        results.append(check(environment, there[environment.python], for_pytest, speed))
    print(table(results))
    if any(result.failed or not result.passed for result in results):
        return 1
    if args.renew:
        LOCK.write_text((ENVIRONMENTS / "lock.txt").read_text())
        print(f"versions: {LOCK.relative_to(REPOSITORY)} is written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
