"""What users read is ours: every line that a command prints on the happy path, on stdout and on stderr, is one that
this project writes. Warnings, remarks and noise at exit that a library adds make a test fail here.

Each command runs as its users start it, in an environment without settings and with Python's own filters of warnings.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, command
from PIL import Image

from dist_train.commands import COMMANDS
from dist_train.config.loading import reference
from dist_train.launch.cluster import SCRIPT

# lines as regular expressions, for whole lines
NUMBER = r"[\d,.]+(?:e[+-]\d+)?"
SHARE = r"\d+\.\d\d %"
TRAINING = (
    rf"digits: {NUMBER} training and {NUMBER} test images; \d ranks? on .+, (?:fp32|bf16|fp16); "
    rf"\d+ steps in {NUMBER} epochs; run folder \S+",
    r"epoch  train loss  train acc  test loss  test acc (?: val loss   val acc )? images/s  elapsed s",
    rf" *{NUMBER} +{NUMBER} +{SHARE} +{NUMBER} +{SHARE}(?: +{NUMBER} +{SHARE})? +{NUMBER} +{NUMBER}",
)
RESULT = (
    rf"digits: test accuracy {SHARE}(?: \({SHARE} with TTA\))? at the last epoch; {NUMBER} s of training "
    rf"\({NUMBER} images/s\), {NUMBER} s (?:in all|since it was resumed)",
    r"curves: \S+loss\.png, \S+accuracy\.png; metrics: \S+metrics\.jsonl, \S+summary\.json",
)
OFFLINE = (r"W&B: offline run in \S+; upload it with: wandb sync \S+",)
# torchrun's own, from before any line of ours is run, where OMP_NUM_THREADS is unset
NOTICE = ("", r"\*{41}", r"Setting OMP_NUM_THREADS environment variable for each process to be 1 in default, .*")
PLOTS = (r"run/plots/(?:loss|accuracy)\.png",)
MARKDOWN = (r"\| .* \|",)
ARCHITECTURE = (
    r"block94: images of 3 x 32 x 32, 10 classes",
    "",
    r"part +layer +output +parameters +% +FLOPs +%",
    "-+",
    r"(?:input|stem|block \d|output|total)  .*",
    r"  (?:a\d* [*=]|sum,) .*",
    r"parameters: .*|FLOPs forward(?: and backward)?: .*|d dilation, .*",
)
PREPARING = (
    r"data_prep: writing digits into data/digits",
    r"dist_train: data/digits is not there yet: the other ranks of this node wait for the first, which prepares it",
)
SHORT = ("--preset", "digits", "epochs=0.1", "precision=fp32", "record.wandb=disabled")

KEPT = ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "CUDA_VISIBLE_DEVICES")


def run(
    folder: Path, *arguments: object, module: str = "dist_train.main", ranks: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command to its end, in `folder`, with a new home in it."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    own = {"HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command(*arguments, ranks=ranks, module=module),
        cwd=folder,
        env={**kept, **own, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def foreign(text: str, ours: tuple[str, ...]) -> list[str]:
    """The lines that are none of ours."""
    return [line for line in text.splitlines() if not any(re.fullmatch(pattern, line) for pattern in ours)]


def check(
    done: subprocess.CompletedProcess[str], out: tuple[str, ...] = (), err: tuple[str, ...] = (), code: int = 0
) -> None:
    """out, err: our lines on stdout and stderr."""
    assert done.returncode == code, done.stderr
    assert foreign(done.stdout, out) == []
    assert foreign(done.stderr, err) == []
    assert done.stdout or code, "it said nothing"


def check_json(done: subprocess.CompletedProcess[str]) -> None:
    """One JSON object and nothing else."""
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart has trained `run`: an epoch with all that is recorded, here on two ranks."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "home").mkdir()
    settings = ("epochs=1", "batch_size=512", "holdout=200", "tta=shift", "every_steps=1", "record.wandb=offline")
    arguments = ("--preset", "digits", "precision=fp32", *settings, "record.system=all", "--run-dir", "run")
    done = run(folder, *arguments, module="dist_train quickstart")
    check(done, (*TRAINING, *RESULT), (*PREPARING, *OFFLINE))
    assert "1 rank " in done.stdout or "2 ranks " in done.stdout
    again = run(folder, *arguments, module="dist_train quickstart")
    check(again, ("run is finished already", *RESULT))
    Image.fromarray(np.full((40, 30, 3), 99, np.uint8)).save(folder / "grey.png")
    return folder


def test_data_prep(place: Path) -> None:
    said = r"data/digits: digits, 1437 train and 360 test images of 32x32x3, (?:ready|verified) \(.* s\)"
    check(run(place, "--dataset", "digits", module="dist_train.data_prep"), (said,))
    check(run(place, "--dataset", "digits", "--verify", module="dist_train prepare"), (said,))


def test_torchrun(place: Path) -> None:
    done = run(place, *SHORT, "loader=stream", "--run-dir", "fp32", ranks=2)
    check(done, (*TRAINING, *RESULT), NOTICE)
    assert done.stderr.count("\n") == 4, "torchrun says it once"
    fp16 = ("precision=fp16", "model.blocks.0.channels=8", "model.blocks.1.channels=8", "--run-dir", "fp16")
    selects = ("train.select.fraction=0.5", "train.select.start=0.4")
    done = run(place, *SHORT, *fp16, *selects, ranks=2, OMP_NUM_THREADS="1", module="dist_train train")
    told = r"training on the hardest 50 % of each microbatch, from 40 to 100 % of the run; train loss and .*"
    check(done, (*TRAINING, *RESULT, told))
    assert done.stdout.count("training on the hardest") == 1


def test_without_a_home(place: Path) -> None:
    """matplotlib and wandb, which keep files there, do not say so between the rows."""
    settings = ("data.dir=data/digits", "record.wandb=offline", "--run-dir", "homeless")
    check(run(place, *SHORT, *settings, HOME="/proc/none"), (*TRAINING, *RESULT), OFFLINE)
    done = run(place, "homeless", module="dist_train plots", HOME="/proc/none")
    check(done, (r"homeless/plots/(?:loss|accuracy)\.png",))


def test_a_run_that_resumes(place: Path) -> None:
    stopped = place / "stopped"
    shutil.copytree(place / "run", stopped)
    (stopped / "summary.json").unlink()
    last = max((stopped / "checkpoints").glob("step-*.pt"))
    last.with_suffix(".pt.sha256").unlink(missing_ok=True)
    last.unlink()
    done = run(place, "--config", "run/config.toml", "record.wandb=offline", "--run-dir", "stopped")
    check(done, (*TRAINING, *RESULT, r"resuming after step \d+"), OFFLINE)
    assert "resuming after step" in done.stdout
    assert " s since it was resumed" in done.stdout  # which may be less than the seconds of all its training


# commands that read a run: module, arguments, and our lines; none where it prints JSON
Reader = tuple[str, list[str], tuple[str, ...]]
READERS: list[Reader] = [
    (
        "export",
        ["run"],
        (
            "file +bytes +largest difference +same answers",
            r"model\.(?:safetensors|pt2|onnx) +[\d,]+ +[\d.e-]+  256 of 256",
            "compared on 256 test images of digits, .*",
        ),
    ),
    ("report", ["run", "run"], (r"report\.html \(\d\.\d MB\): open it in a browser",)),
    ("plots", ["run"], PLOTS),
    ("table", ["."], MARKDOWN),
    ("diff", ["run", "run"], (r"same: \d+ steps, \d evaluations?, final weights [0-9a-f]{64}",)),
    ("describe", ["block94"], ARCHITECTURE),
    ("describe", ["block94", "--markdown", "--picture", "a.svg"], (*MARKDOWN, "", rf"- (?:{ARCHITECTURE[-1]})")),
    ("describe", ["run", "--json", "--picture", "a.png"], ()),
    ("predict", ["run", "grey.png", "--tta", "shift"], (r"grey\.png", rf"    digit \d +{SHARE}  [█▏▎▍▌▋▊▉]*")),
    ("predict", ["run", "grey.png", "--json"], ()),
    (
        "evaluate",
        ["run", "--split", "holdout"],
        (
            r"digits, holdout: 200 images, after step \d",
            rf"(?:accuracy|with TTA|calibration error) .*{NUMBER}\)?",
            "",
            r"class +images +accuracy +most often taken for",
            rf"digit \d +\d+ +{SHARE}(?:  .*digit \d \(\d+\))?",
        ),
    ),
    ("upload", ["run", "--offline"], (r"run: \S+/wandb/offline-run-\S+",)),
    ("dashboard", ["--json"], ()),
]


@pytest.fixture(scope="module")
def answers(place: Path) -> list[subprocess.CompletedProcess[str]]:
    """What each of them prints; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda reader: run(place, *reader[1], module=f"dist_train {reader[0]}"), READERS))


@pytest.mark.parametrize("number", range(len(READERS)), ids=[" ".join([name, *given]) for name, given, _ in READERS])
def test_readers(answers: list[subprocess.CompletedProcess[str]], number: int) -> None:
    module, _, ours = READERS[number]
    if module == "export":
        pytest.importorskip("onnxscript")
    if ours:
        check(answers[number], ours, OFFLINE if module == "upload" else ())
    else:
        check_json(answers[number])


def test_evaluate_on_two_ranks(place: Path) -> None:
    done = run(place, "run", "--json", module="dist_train evaluate", ranks=2, OMP_NUM_THREADS="1")
    check_json(done)


def test_submit(place: Path) -> None:
    done = run(place, "--local", *SHORT, module="dist_train submit")
    check(
        done, (r"1 on this machine; run folder \S+", r"its log: tail -F \S+_log\.out", rf"\S+: test accuracy {SHARE}")
    )
    (log,) = (place / "runs").glob("*/slurm/*_log.out")
    submitit = r"submitit INFO \(.*\) - .*"
    assert foreign(log.read_text(), (*TRAINING, *RESULT, submitit)) == []
    none = run(place, "--dry-run", *SHORT, module="dist_train submit", PATH="/nowhere")
    check(none, err=(r"dist_train: there is no Slurm on this machine \(no sbatch in PATH\); .*",), code=2)


def squeezed(text: str) -> str:
    """Without quotes and line breaks."""
    return re.sub(r"[\s\"]+", " ", text).strip()


def test_help(place: Path) -> None:
    sources = [path.read_text() for path in (REPOSITORY / "dist_train").glob("**/*.py")]
    sources += [path.read_text() for part in ("data_prep", "launch") for path in (REPOSITORY / part).glob("*.py")]
    written = squeezed(" ".join([*sources, reference()]))
    modules = ["dist_train.main", "dist_train.data_prep", *(f"dist_train {name}" for name in ("", *COMMANDS))]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda module: run(place, "--help", module=module), modules))
    for module, done in zip(modules, answers, strict=True):
        assert (done.returncode, done.stderr) == (0, ""), module
        copied = "{shlex.join(['cp', str(cluster.SCRIPT), 'slurm/'])}"
        shown = done.stdout.replace(shlex.join(["cp", str(SCRIPT), "slurm/"]), copied)
        usage, *lines = shown.replace(str(SCRIPT), "{cluster.SCRIPT}").splitlines()
        assert usage.startswith("usage: dist-train "), module
        # of the rest, what is not indented stands in our sources, up to where lines break
        headings = ("positional arguments:", "options:")
        text = [line for line in lines if line and not line.startswith(" ") and line not in headings]
        assert [line for line in text if squeezed(line) not in written] == [], module


# what Python runs at its start, as a library would: a warning, a remark in a log, and noise at exit
NOISE = {
    "warning": "import warnings; warnings.warn('`all_gather` is deprecated.', FutureWarning)",
    "log": "import logging; logging.getLogger('library').warning('is building a cache')",
    "print": "print('Files already downloaded and verified')",
    "exit": "import atexit, os; atexit.register(os.write, 2, b'terminate called without an active exception\\n')",
}


@pytest.mark.parametrize("kind", NOISE)
def test_a_line_of_a_library_is_noticed(place: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOISE[kind])
    done = run(place, "run", module="dist_train plots", PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert len(foreign(done.stdout, PLOTS)) + len(foreign(done.stderr, ())) in (1, 2)  # a warning shows its line too


def test_a_warning_on_another_rank_is_noticed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1': {NOISE['warning']}")
    search = f"{tmp_path}:{REPOSITORY}"
    arguments = ("--config", "run/config.toml", "record.wandb=offline", "--run-dir", "run")
    done = run(place, *arguments, ranks=2, OMP_NUM_THREADS="1", PYTHONPATH=search)
    assert foreign(done.stdout, ("run is finished already", *RESULT)) == []
    (line, *_) = foreign(done.stderr, ())
    assert line.endswith("FutureWarning: `all_gather` is deprecated.")
