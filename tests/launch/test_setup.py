"""launch/setup.sh and launch/install.py: the lock, pip's configuration, other environments, no root and no compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

from dist_train.launch import install

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PINS = [Requirement(line) for line in install.LOCK.read_text().splitlines() if line[:1].isalnum()]
COMPILERS = re.compile(r"(.*-)?(g\+\+|gcc|cc|c\+\+|cpp|clang.*|pkg-config|pkgconf)(-[0-9.]+)?|apt-get|sudo")


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/setup.sh", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_has_every_requirement_in_its_range(python: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    place = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pins = {pin.name.lower(): pin for pin in PINS if pin.marker is None or pin.marker.evaluate(place)}
    for wanted in map(Requirement, texts):
        if wanted.name != "dist-train" and (wanted.marker is None or wanted.marker.evaluate(place)):
            (pin,) = pins[wanted.name.lower()].specifier
            assert pin.operator == "=="
            assert wanted.specifier.contains(pin.version), f"{wanted}: the lock has {pin.version}"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", {}),
        ("global.index-url='https://mirror/simple'", {"UV_DEFAULT_INDEX": "https://mirror/simple"}),
        (
            "global.index-url='https://mirror/simple'\n:env:.index-url='https://nearer/simple'",
            {"UV_DEFAULT_INDEX": "https://nearer/simple"},
        ),
        (
            "global.extra-index-url='\\nhttps://a/simple\\nhttps://b/simple'",
            {
                "UV_INDEX": "https://pypi.org/simple https://a/simple",
                "UV_DEFAULT_INDEX": "https://b/simple",
                "UV_INDEX_STRATEGY": "unsafe-best-match",
            },
        ),
        ("install.constraint='/a.txt /b.txt'", {"UV_CONSTRAINT": "/a.txt /b.txt"}),
        (
            ":env:.find-links='/wheels https://b'",
            {"UV_FIND_LINKS": "/wheels,https://b", "UV_INDEX_STRATEGY": "unsafe-best-match"},
        ),
        (":env:.default-timeout='180'\nglobal.cert='/ca.pem'", {"UV_HTTP_TIMEOUT": "180", "SSL_CERT_FILE": "/ca.pem"}),
        ("global.progress-bar='off'\nnot a line of pip", {}),
    ],
)
def test_pip_configuration_reaches_uv(listed: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("UV_") or name == "SSL_CERT_FILE"]:
        monkeypatch.delenv(name)
    assert install.pip_configuration(listed) == expected


def test_uv_settings_are_stronger_than_those_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine/simple")
    assert install.pip_configuration("global.index-url='https://mirror/simple'") == {}


def test_deviations_from_the_lock_are_named() -> None:
    numpy = version("numpy")
    lock = f"""# a comment
numpy=={numpy}
    # via torch
torch==0.1 ; python_full_version >= '3.10'
pillow==0.2 ; python_full_version < '3.10'
not-installed-anywhere==1.0
"""
    assert install.deviations(lock) == [f"torch {version('torch').partition('+')[0]} (locked: 0.1)"]


def test_constraints_change_only_what_they_must(tmp_path: Path) -> None:
    lock = install.LOCK.read_text()
    pins = {pin.name: next(iter(pin.specifier)).version for pin in PINS if pin.marker is None}
    constraint = tmp_path / "constraints.txt"
    constraint.write_text(f"wandb<={pins['wandb']}\npydantic<{pins['pydantic']}\n")
    try:
        chosen = install.resolve(install.uv(), [], lock, {"UV_CONSTRAINT": str(constraint)})
    except install.InstallError as error:
        if re.search("error sending request|dns error|Failed to fetch", str(error)):
            pytest.skip("the package index cannot be reached")
        raise
    versions = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", chosen, re.MULTILINE))
    changed = {name for name, version in versions.items() if pins.get(name, version) != version}
    assert changed == {"pydantic", "pydantic-core"}


def test_bad_arguments_are_one_sentence(tmp_path: Path) -> None:
    done = setup("--newest")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "setup: --newest: there is no such argument; use --latest, dev or none\n"
    done = setup(DIST_TRAIN_VENV=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"setup: {tmp_path} holds no bin/python: name ")


def test_without_root_or_compiler(tmp_path: Path) -> None:
    """A user without root, compiler and headers sets up a fresh environment and trains `digits` in it."""
    alone = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine has no user namespaces")
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in reversed(os.environ["PATH"].split(os.pathsep)):
        for path in Path(folder).glob("*"):
            if not COMPILERS.fullmatch(path.name):
                (tools / path.name).unlink(missing_ok=True)
                (tools / path.name).symlink_to(path)
    (tools / "python3").unlink()
    (tools / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    own = tmp_path / "environment"
    run = tmp_path / "run"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "PYTHON", "VIRTUAL_ENV"))}
    settings = ["--preset", "digits", "epochs=1", "precision=fp32", "loader=stream", f"data.dir={tmp_path / 'data'}"]
    done = subprocess.run(
        [*alone, "bash", "launch/quickstart.sh", *settings, "--run-dir", str(run)],
        cwd=REPOSITORY,
        env={**kept, "PATH": str(tools), "DIST_TRAIN_VENV": str(own), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"setup: making {own} with Python 3" in done.stderr
    assert re.search(r"setup: without ffcv, since building it takes a C\+\+ compiler, .*libopencv-dev", done.stderr)
    assert not list(own.glob("lib/python3*/site-packages/ffcv"))
    ours = r"(setup|data_prep|dist_train|W&B): .*"
    assert [line for line in done.stderr.splitlines() if line and not re.fullmatch(ours, line)] == []
    summary = json.loads((run / "summary.json").read_text())
    assert summary["versions"]["ffcv"] is None
    assert 0 < summary["test_accuracy"] <= 1
    again = subprocess.run(
        [*alone, "bash", "launch/setup.sh"],
        cwd=REPOSITORY,
        env={**kept, "PATH": str(tools), "DIST_TRAIN_VENV": str(own)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (again.returncode, again.stderr) == (0, "")
