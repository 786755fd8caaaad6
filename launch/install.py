"""Install this clone and the packages it stands on into the environment of the Python that runs this.

    ENVIRONMENT/bin/python launch/install.py [--latest | --keep] [EXTRA ...]

launch/setup.sh calls it. It imports the standard library alone. The versions are those of launch/lock.txt as far as the
package index and pip's own configuration allow, and otherwise the newest within the ranges of pyproject.toml: uv, which
does the work, treats the versions in the output file of a resolution as preferences. --latest ignores the lock. --keep,
for an environment that was there before, prefers what it holds already to the lock.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK = REPOSITORY / "launch" / "lock.txt"
PYPI = "https://pypi.org/simple"  # pip's default
UV = "uv>=0.5,<1"
PIP_IS_THERE = find_spec("pip") is not None
PROGRESS = 10.0  # seconds between two lines about a part that takes longer

# pip's options and the variables by which uv takes the same
_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
}


class InstallError(RuntimeError):
    """uv or pip could not do its part. The message is the end of what it printed."""


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Print what begins, the seconds so far every PROGRESS seconds, and how many it took."""
    say(part)
    start, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(PROGRESS):
            say(f"... {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    say(f"{part}: done in {time.monotonic() - start:.1f} s")


def run(command: list[str], variables: dict[str, str] | None = None) -> str:
    """Run a command silently. Returns its standard output. Raises InstallError."""
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **(variables or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise InstallError("\n".join(said[-20:]))
    return done.stdout


def pip_configuration(listed: str) -> dict[str, str]:
    """What `pip config list` prints as environment variables for uv, which does not read pip's configuration itself.

    The order of precedence is pip's: environment, then [install], then [global].
    """
    options: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listed.splitlines():
            match = re.fullmatch(rf"{re.escape(section)}\.(?:default-)?([a-z-]+)=('.*'|\".*\")", line.strip())
            if match:
                options[match[1]] = str(ast.literal_eval(match[2]))
    found = {_VARIABLES[name]: " ".join(value.split()) for name, value in options.items() if name in _VARIABLES}
    if "find-links" in options:
        found["UV_FIND_LINKS"] = ",".join(options["find-links"].split())
    if extra := options.get("extra-index-url", "").split():
        # The default index comes last, and of a version that is in several, uv sees the files of the first alone.
        *first, found["UV_DEFAULT_INDEX"] = [options.get("index-url", PYPI), *extra]
        found["UV_INDEX"] = " ".join(first)
    if "extra-index-url" in options or "find-links" in options:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip, too, takes the best version of all indexes
    return {name: value for name, value in found.items() if name not in os.environ}


def uv() -> str:
    """The path of uv: this environment's own, installed if it is missing, or the one in PATH where there is no pip.
    Raises InstallError."""
    own = Path(sys.prefix) / "bin" / "uv"
    if own.exists():
        return str(own)
    if not PIP_IS_THERE and (other := shutil.which("uv")):
        return other
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    try:
        run([*pip, "-c", str(LOCK), "uv"])
    except InstallError:
        run([*pip, UV])  # the lock's version is not to be had here
    return str(own)


def resolve(uv: str, extras: list[str], preferred: str, variables: dict[str, str]) -> str:
    """The versions to install, as a requirements file. preferred: versions to take where they are possible, in the
    same form. Raises InstallError."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "versions.txt"
        output.write_text(preferred)
        options = ["-q", "--no-header", "--no-annotate", "--python", sys.executable, "-o", str(output)]
        options += [word for extra in extras for word in ("--extra", extra)]
        run([uv, "pip", "compile", *options, "pyproject.toml"], variables)
        return output.read_text()


def install(uv: str, extras: list[str], versions: str, variables: dict[str, str]) -> None:
    """Install this clone, editable, and what it needs, in these versions. Raises InstallError."""
    target = f"-e .[{','.join(extras)}]" if extras else "-e ."
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(versions)
        file.flush()
        run([uv, "pip", "install", "-q", "--python", sys.executable, *target.split(), "-c", file.name], variables)


def deviations(lock: str) -> list[str]:
    """`name version (locked: version)` of each package in this environment that is not as in the lock."""
    from packaging.requirements import Requirement  # not before it is installed

    there = held()
    changed = []
    for line in lock.splitlines():
        if not line[:1].isalnum():
            continue
        wanted = Requirement(line.partition("#")[0].strip())
        version = there.get(wanted.name.lower())
        if version and (wanted.marker is None or wanted.marker.evaluate()) and not wanted.specifier.contains(version):
            changed.append(f"{wanted.name} {version} (locked: {str(wanted.specifier).removeprefix('==')})")
    return changed


def held() -> dict[str, str]:
    """{name: version} of what this environment holds; versions as an index has them, without a local part."""
    invalidate_caches()
    return {d.metadata["Name"].lower(): d.version.partition("+")[0] for d in distributions() if d.metadata["Name"]}


def main() -> int:
    """Returns the exit code: 0, or 2 when the packages could not be installed, which was said."""
    parser = argparse.ArgumentParser(prog="launch/install.py", description="Called by launch/setup.sh.")
    parser.add_argument("--latest", action="store_true", help="the newest versions that pyproject.toml allows")
    parser.add_argument("--keep", action="store_true", help="prefer what the environment holds to the lock")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="an extra of pyproject.toml")
    args = parser.parse_args()
    lock = "" if args.latest else LOCK.read_text()
    preferred = lock
    if args.keep:
        mine = held()
        missing = [line for line in lock.splitlines() if line.partition("==")[0].lower() not in mine]
        preferred = "\n".join([*missing, *(f"{name}=={version}" for name, version in mine.items()), ""])
    variables = pip_configuration(run([sys.executable, "-m", "pip", "config", "list"])) if PIP_IS_THERE else {}
    part = f"Python packages into {sys.prefix} (some 3 GB to download the first time)"
    if "ffcv" in args.extras:
        part = "ffcv, built from source"
    try:
        path = uv()
        with timed(part):
            install(path, args.extras, resolve(path, args.extras, preferred, variables), variables)
    except InstallError as error:
        print(error, file=sys.stderr)
        say(f"{part}: this failed; the end of what was printed is above")
        return 2
    if "ffcv" not in args.extras and (changed := sorted(deviations(lock), key=_indirect)):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        why = "the environment held others" if args.keep else "the package index or pip's constraints here rule it out"
        say(f"not the locked version, since {why}: {', '.join(changed[:3])}{more}")
    return 0


def _indirect(deviation: str) -> bool:
    """Sorts what pyproject.toml names before what that needs."""
    return f'"{deviation.split()[0]}>=' not in (REPOSITORY / "pyproject.toml").read_text()


if __name__ == "__main__":
    sys.exit(main())
