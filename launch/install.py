"""Install this clone and its dependencies into the environment of the Python that runs this script.

    ENVIRONMENT/bin/python launch/install.py [--latest | --keep] [EXTRA ...]

launch/setup.sh calls it. It imports only the standard library. The versions are those of launch/lock.txt where the
package index and pip's configuration allow them, and otherwise the newest within the ranges of pyproject.toml: uv,
which resolves and installs, treats the versions in the output file of a resolution as preferences. --latest ignores the
lock. --keep, for an environment that existed before, prefers the versions installed there to the lock.
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
HAS_PIP = find_spec("pip") is not None
PROGRESS = 10.0  # seconds between two lines on the progress of a long part

# pip's options and uv's environment variables for the same
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
    """uv or pip failed. The message is the end of its output."""


def say(message: str) -> None:
    """Print a message to stderr."""
    print(f"setup: {message}", file=sys.stderr, flush=True)


@contextmanager
def timed(part: str) -> Iterator[None]:
    """A context that prints the name of a part, the elapsed seconds every PROGRESS seconds, and the seconds it took."""
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
        command,
        cwd=REPOSITORY,
        env={**os.environ, **(variables or {})},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise InstallError("\n".join(output[-20:]))
    return done.stdout


def pip_configuration(listed: str) -> dict[str, str]:
    """Environment variables for uv, which does not read pip's configuration. listed: the output of `pip config list`.

    The order of precedence is pip's: environment, then [install], then [global].
    """
    options: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listed.splitlines():
            match = re.fullmatch(rf"{re.escape(section)}\.(?:default-)?([a-z-]+)=('.*'|\".*\")", line.strip())
            if match:
                options[match[1]] = str(ast.literal_eval(match[2]))
    variables = {_VARIABLES[name]: " ".join(value.split()) for name, value in options.items() if name in _VARIABLES}
    if "find-links" in options:
        variables["UV_FIND_LINKS"] = ",".join(options["find-links"].split())
    if extra := options.get("extra-index-url", "").split():
        # uv searches the default index last, and takes a version that is in several indexes from the first of them
        *first, variables["UV_DEFAULT_INDEX"] = [options.get("index-url", PYPI), *extra]
        variables["UV_INDEX"] = " ".join(first)
    if "extra-index-url" in options or "find-links" in options:
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip, too, takes the best version of all indexes
    return {name: value for name, value in variables.items() if name not in os.environ}


def uv() -> str:
    """The path of uv: in this environment, installed there if it is missing, or in PATH where there is no pip. Raises
    InstallError."""
    own = Path(sys.prefix) / "bin" / "uv"
    if own.exists():
        return str(own)
    if not HAS_PIP and (other := shutil.which("uv")):
        return other
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    try:
        run([*pip, "-c", str(LOCK), "uv"])
    except InstallError:
        run([*pip, UV])  # the package index lacks the locked version
    return str(own)


def resolve(uv: str, extras: list[str], preferred: str, variables: dict[str, str]) -> str:
    """The versions to install, as the text of a requirements file. preferred: versions to take where possible, in the
    same form. Raises InstallError."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "versions.txt"
        output.write_text(preferred, encoding="utf-8")
        options = ["-q", "--no-header", "--no-annotate", "--python", sys.executable, "-o", str(output)]
        options += [word for extra in extras for word in ("--extra", extra)]
        run([uv, "pip", "compile", *options, "pyproject.toml"], variables)
        return output.read_text(encoding="utf-8")


def install(uv: str, extras: list[str], versions: str, variables: dict[str, str]) -> None:
    """Install this clone, editable, and its dependencies in these versions. Raises InstallError."""
    target = f"-e .[{','.join(extras)}]" if extras else "-e ."
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(versions)
        file.flush()
        run([uv, "pip", "install", "-q", "--python", sys.executable, *target.split(), "-c", file.name], variables)


def deviations(lock: str) -> list[str]:
    """`name version (locked: version)` of each package in this environment whose version differs from the lock."""
    from packaging.requirements import Requirement  # not at the top: this script installs it

    versions = installed()
    changed = []
    for line in lock.splitlines():
        if not line[:1].isalnum():
            continue
        wanted = Requirement(line.partition("#")[0].strip())
        version = versions.get(wanted.name.lower())
        if version and (wanted.marker is None or wanted.marker.evaluate()) and not wanted.specifier.contains(version):
            changed.append(f"{wanted.name} {version} (locked: {str(wanted.specifier).removeprefix('==')})")
    return changed


def installed() -> dict[str, str]:
    """{name: version} of the packages in this environment; versions without their local part, as in an index."""
    invalidate_caches()
    return {d.metadata["Name"].lower(): d.version.partition("+")[0] for d in distributions() if d.metadata["Name"]}


def main() -> int:
    """Run the command. Returns the exit code: 0, or 2 when the packages could not be installed, after a message."""
    parser = argparse.ArgumentParser(prog="launch/install.py", description="Called by launch/setup.sh.")
    parser.add_argument("--latest", action="store_true", help="the newest versions that pyproject.toml allows")
    parser.add_argument("--keep", action="store_true", help="prefer installed versions to the lock")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="an extra of pyproject.toml")
    args = parser.parse_args()
    lock = "" if args.latest else LOCK.read_text(encoding="utf-8")
    preferred = lock
    if args.keep:
        versions = installed()
        missing = [line for line in lock.splitlines() if line.partition("==")[0].lower() not in versions]
        preferred = "\n".join([*missing, *(f"{name}=={version}" for name, version in versions.items()), ""])
    variables = pip_configuration(run([sys.executable, "-m", "pip", "config", "list"])) if HAS_PIP else {}
    part = f"Python packages into {sys.prefix} (some 3 GB to download the first time)"
    if "ffcv" in args.extras:
        part = "ffcv, built from source"
    try:
        path = uv()
        with timed(part):
            install(path, args.extras, resolve(path, args.extras, preferred, variables), variables)
    except InstallError as error:
        print(error, file=sys.stderr)
        say(f"{part}: failed; the end of the output is above")
        return 2
    if "ffcv" not in args.extras and (changed := sorted(deviations(lock), key=_indirect)):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        why = "the environment had others" if args.keep else "the package index or pip's constraints rule it out"
        say(f"not the locked version, since {why}: {', '.join(changed[:3])}{more}")
    return 0


def _indirect(deviation: str) -> bool:
    """A sort key: dependencies that pyproject.toml names come before indirect ones."""
    return f'"{deviation.split()[0]}>=' not in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
