"""The package as it is installed from a wheel: what is in it, and that all its commands work outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, environment

# runs one command after another, each as python -m does, but imports torch only once
COMMANDS = """
import json, sys
from pathlib import Path
import dist_train
from dist_train.__main__ import main
assert Path(dist_train.__file__).is_relative_to(sys.argv[1]), dist_train.__file__
for command in json.loads(sys.argv[2]):
    assert main(command) == 0, command
    print("ran dist-train", command[0], flush=True)
"""


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel with the setuptools that is installed, so that no network is needed."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An sdist, the wheel from it, and the wheel from a clone."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    clone = folder / "clone"
    clone.mkdir()
    for name in ("dist_train", "data_prep", "launch", "slurm"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, clone / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, clone)
    sdist = build("sdist", clone, folder)
    with tarfile.open(sdist) as files:
        files.extraction_filter = getattr(tarfile, "data_filter", None)
        files.extractall(folder)
    direct = folder / "direct"
    direct.mkdir()
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return sdist, build("wheel", unpacked, folder), build("wheel", clone, direct)


def test_contents_of_the_archives(archives: tuple[Path, Path, Path]) -> None:
    sdist, wheel, direct = archives
    with tarfile.open(sdist) as files:
        members = files.getmembers()
    assert all(member.isreg() or member.isdir() for member in members)  # no links that lead nowhere
    in_sdist = {member.name.partition("/")[2] for member in members if member.isreg()}
    with zipfile.ZipFile(wheel) as zipped:
        names = set(zipped.namelist())
        (top,) = (name for name in names if name.endswith("top_level.txt"))
        assert zipped.read(top).split() == [b"dist_train"]
        contents = {name: zipped.read(name) for name in names}
    with zipfile.ZipFile(direct) as zipped:
        assert set(zipped.namelist()) == names
    installed = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in installed} == {"dist_train"}
    tracked = subprocess.run(
        ["git", "ls-files", "dist_train", "data_prep", "launch", "slurm"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("these tests do not run in a clone")
    files_here = {path for path in tracked.stdout.split() if not (REPOSITORY / path).is_symlink()}
    wanted = {path if path.startswith("dist_train/") else f"dist_train/{path}" for path in files_here}
    left_out = {f"dist_train/launch/{name}" for name in ("setup.sh", "quickstart.sh", "lock.txt")}  # of a clone
    left_out |= {path for path in wanted if path.endswith(".md")}
    assert wanted - left_out <= installed
    assert wanted - left_out <= in_sdist
    assert contents["dist_train/slurm/train.sh"] == (REPOSITORY / "slurm" / "train.sh").read_bytes()


def test_every_command_works_outside_the_repository(archives: tuple[Path, Path, Path], tmp_path: Path) -> None:
    # in a folder of somebody's own repository, as a .venv in it would be
    packages, here = tmp_path / "lib", tmp_path / "elsewhere"
    here.mkdir()
    with zipfile.ZipFile(archives[1]) as zipped:
        zipped.extractall(packages)
    (tmp_path / ".gitignore").write_text("*\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=somebody", "-c", "user.email=s@example.org"]
    for words in (["init", "-q"], ["add", "-f", ".gitignore"], ["commit", "-qm", "of another project"]):
        subprocess.run([*git, *words], check=True)

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=here,
            env={**environment(), "PYTHONPATH": str(packages), "WANDB_MODE": "offline", "PATH": path},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run("dist_train.data_prep", "--dataset", "digits")
    tiny = ["--preset", "digits", *TINY[:2], "epochs=1"]
    run("dist_train.main", *tiny, "record.wandb=disabled", "--run-dir", "runs/one")
    two = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dist_train.main"]
    run(*two, *tiny, "--run-dir", "runs/two")  # W&B offline
    summaries = [json.loads((here / "runs" / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert summaries[0]["git_commit"] is None  # not the other project's
    assert list((here / "runs" / "two" / "wandb").glob("*/*.wandb"))

    commands = [
        ["describe", "block94"],
        ["describe", "runs/one", "--picture", "picture.svg"],
        ["report", "runs/one", "runs/two", "--out", "report.html"],
        ["plots", "runs/one"],
        ["diff", "runs/one", "runs/two"],
        ["table", "runs"],
        ["evaluate", "runs/one"],
        ["export", "runs/one", "--format", "safetensors"],
        ["predict", "runs/one", "picture.png"],
        ["submit", "--local", "--dry-run", "--preset", "digits"],
    ]
    picture = "from PIL import Image; Image.new('RGB', (40, 30)).save('picture.png')"
    subprocess.run([sys.executable, "-c", picture], cwd=here, check=True)
    script = here / "commands.py"
    script.write_text(COMMANDS)
    (here / "slurm").mkdir()
    done = run("commands", str(packages), json.dumps(commands))
    assert done.count("ran dist-train ") == len(commands)
    assert "digit" in done
    assert (here / "report.html").stat().st_size > 100_000
    out = run("dist_train", "submit", "--local", *tiny, "record.wandb=disabled", "--run-dir", "runs/local")
    assert "runs/local: test accuracy" in out
