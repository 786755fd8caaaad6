"""Measures the seconds from a fresh clone to the first training step, and to the end of the tests, by part.

    python -m benchmarks.setup [--tests] [--rounds 1] [--out FILE] [arguments of the trainer]

Each round clones this repository's HEAD twice, and runs `launch/quickstart.sh`: in the first clone with empty caches
of pip and uv, in the second with those that the first has filled. System packages are included where this machine lacks
them. With --tests each clone then runs `tests/run.sh`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import arguments
from benchmarks.table import append, command, measured_on, spread, table
from dist_train.command_line import command as answers_bad_input
from dist_train.command_line import positive
from dist_train.errors import DONE
from dist_train.runs.layout import METRICS

REPOSITORY = Path(__file__).resolve().parent.parent
_DONE = re.compile(r"setup: (.*?)(?: into .*)?: done in ([0-9.]+) s")


@answers_bad_input
def main() -> int:
    parser = arguments.parser("setup", __doc__)
    parser.add_argument("--tests", action="store_true", help="also run the tests")
    parser.add_argument("--rounds", type=positive, default=1)
    arguments.add_out(parser)
    args, trainer = parser.parse_known_args()
    rows: dict[str, list[dict[str, float]]] = {"empty": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "home"
            home.mkdir()
            for caches, rounds in rows.items():
                clone = Path(folder) / caches
                subprocess.run(["git", "clone", "-q", REPOSITORY, clone], check=True)
                rounds.append(_round(clone, home, trainer, args.tests))
    parts = list(dict.fromkeys(part for rounds in rows.values() for row in rounds for part in row))
    body = [[part, *(spread([row.get(part, 0.0) for row in rounds], 1) for rounds in rows.values())] for part in parts]

    import torch

    conditions = measured_on(torch.device("cpu"), os.cpu_count() or 1)
    head = ["part", *(f"seconds, {caches} caches" for caches in rows)]
    text = f"n = {args.rounds}; {conditions}\n\n```bash\n{command('benchmarks.setup')}\n```\n\n{table(head, body)}\n"
    print(text)
    if args.out:
        append(args.out, text)
    return DONE


def _round(clone: Path, home: Path, trainer: list[str], tests: bool) -> dict[str, float]:
    """The seconds of a clone by part. home: the home folder, for the caches."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("UV_CACHE", "PIP_CACHE", "XDG_", "VIRTUAL_ENV"))}
    environment = {**kept, "HOME": str(home), "WANDB_MODE": "offline"}
    start = time.monotonic()
    setup = subprocess.run(
        ["bash", "launch/setup.sh"],
        cwd=clone,
        env=environment,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=True,
    )
    row = {part: float(seconds) for part, seconds in _DONE.findall(setup.stderr)}
    whole = time.monotonic() - start
    row["set-up, the rest"] = whole - sum(row.values())
    row["set-up"] = whole

    begun = time.monotonic()
    process = subprocess.Popen(
        ["bash", "launch/quickstart.sh", *trainer, "log_every=1"],
        cwd=clone,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stepped = False
    while not stepped and process.poll() is None:
        stepped = any('"step"' in path.read_text(encoding="utf-8") for path in clone.glob(f"runs/*/{METRICS}"))
        time.sleep(0.05)
    row["data step and start of the training"] = time.monotonic() - begun
    row["clone to the end of the first step"] = time.monotonic() - start
    process.terminate()
    process.wait()
    if not stepped:
        raise SystemExit("benchmarks.setup: the training ended before its first step")
    if tests:
        begun = time.monotonic()
        subprocess.run(["bash", "tests/run.sh"], cwd=clone, env=environment, check=True)
        row["tests/run.sh after that"] = time.monotonic() - begun
    return row


if __name__ == "__main__":
    sys.exit(main())
