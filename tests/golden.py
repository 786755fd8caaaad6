"""Golden digests: stored digests of the weights after every step of short runs, so that a change of bits is noticed.

    python -m tests.golden                        # compare with the stored digests
    python -m tests.golden --write                # store the digests of this machine
    python -m tests.golden --compare main         # compare this working tree with a commit, on this machine

A file of `tests/golden/` belongs to one version of torch and one CPU capability, as torch names it. Within it an entry
belongs to one arithmetic: the digest of what torch alone, without dist_train, computes. Processors of one capability
may differ in it, since oneDNN and MKL choose their kernels by more than the capability. Where there is no entry, use
`--compare`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
STORED = REPOSITORY / "tests" / "golden"
BUILD = REPOSITORY / "build" / "golden"


@dataclass(frozen=True)
class Run:
    """A short training. ranks: the numbers of ranks to run it on; the digests must be the same for each."""

    settings: tuple[str, ...]
    ranks: tuple[int, ...] = (2,)


_DIGITS = ("--preset", "digits", "train.epochs=2")
RUNS = {
    "digits-fp32": Run((*_DIGITS, "precision=fp32"), ranks=(1, 2)),
    "digits-bf16": Run((*_DIGITS, "precision=bf16")),
    # every augmentation, every kind of evaluation, a held-out set, a stem that stops learning, and selected images
    "digits-all": Run(
        (
            *_DIGITS,
            *("precision=fp32", "flip=alternate", "cutout=6", "holdout=200", "evaluate.tta=shift"),
            *("data.smaller=[{size=20, until=0.3, how='scale'}]", "optim.stem.until=0.6"),
            "train.select={fraction=0.6, start=0.5, size=24}",
        )
    ),
    # the hardest images by their last losses
    "digits-last": Run((*_DIGITS, "precision=fp32", "train.select={fraction=0.5, start=0.5, losses='last'}")),
    # the first three steps of the whole network, on a small set and all of its images
    "block94": Run(
        (
            *("--preset", "block94", "data.dataset=digits", "batch_size=160", "epochs=0.3", "evaluate.tta=none"),
            "train.select={fraction=1}",
        )
    ),
}

Digests = dict[str, str]  # keys: `step 1`, ..., `evaluation after step 22`

# A computation with torch alone, without dist_train: convolutions and their gradients, matrix products, and the other
# operations of the networks, in both precisions.
_ARITHMETIC = """
import hashlib
import torch
from torch import nn

torch.set_num_threads(1)
found = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 24, 2), nn.GELU(), nn.Conv2d(24, 64, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.GELU(),
        nn.Conv2d(64, 64, 1), nn.Conv2d(64, 128, 3, padding=2, dilation=2), nn.AvgPool2d(2), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    images = torch.rand(20, 3, 32, 32).to(memory_format=torch.channels_last)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(images)
        nn.functional.cross_entropy(logits.float(), torch.arange(20) % 10).backward()
        optimizer.step()
    for parameter in network.parameters():
        found.update(parameter.detach().contiguous().numpy().tobytes())
matrices = torch.rand(48, 600)
for matrix in (matrices, matrices.bfloat16()):
    found.update((matrix @ matrix.mT).float().numpy().tobytes())
    found.update((matrix @ torch.rand(600, 1).to(matrix)).float().numpy().tobytes())
symmetric = matrices[:, :48].double()
found.update(torch.linalg.eigh(symmetric @ symmetric.T).eigenvectors.numpy().tobytes())
small = nn.functional.interpolate(images, (20, 20), mode="bilinear", antialias=True)
found.update(torch.softmax(small.flatten(1), 1).contiguous().numpy().tobytes())
found.update(torch.sigmoid(small).contiguous().numpy().tobytes())
found.update(small.norm(dim=1).contiguous().numpy().tobytes())
print(torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability(), found.hexdigest()[:16])
"""


@dataclass(frozen=True)
class Machine:
    """The properties of a machine that the digests depend on. torch: its version. capability: of the CPU, as torch
    names it. arithmetic: digest of the results of _ARITHMETIC, 16 hexadecimal digits."""

    torch: str
    capability: str
    arithmetic: str

    @property
    def path(self) -> Path:
        """The file for this machine's entry."""
        return STORED / f"torch-{self.torch}-{self.capability}.json"

    def __str__(self) -> str:
        return f"torch {self.torch} on {self.capability}, arithmetic {self.arithmetic}"


def this_machine() -> Machine:
    """The properties of this machine, determined in a new process with one thread."""
    done = subprocess.run([sys.executable, "-c", _ARITHMETIC], env=_environment(), capture_output=True, check=True)
    return Machine(*done.stdout.decode().split())


def stored(machine: Machine) -> dict[str, Digests] | None:
    """The stored digests of every run for such a machine, None where there are none."""
    if not machine.path.exists():
        return None
    entries: dict[str, dict[str, Digests]] = json.loads(machine.path.read_text())
    return entries.get(machine.arithmetic)


def write(machine: Machine, runs: dict[str, Digests]) -> None:
    """Store the digests of some runs; those of other runs and machines are kept."""
    entries = json.loads(machine.path.read_text()) if machine.path.exists() else {}
    entries[machine.arithmetic] = {**entries.get(machine.arithmetic, {}), **runs}
    machine.path.parent.mkdir(exist_ok=True)
    machine.path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def digests(name: str, ranks: int, repository: Path = REPOSITORY) -> Digests:
    """Train one of RUNS with the code in `repository`. Raises CalledProcessError, after the trainer's message."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m"]
        if ranks > 1:
            start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        settings = [*RUNS[name].settings, f"data.dir={folder}/betons", "record.digest_every=1", "record.quiet=true"]
        settings += ["record.wandb=disabled", "train.device=cpu", "--run-dir", f"{folder}/run"]
        command = [*start, "dist_train.main", *settings]
        subprocess.run(command, cwd=repository, env=_environment(repository), stdout=subprocess.DEVNULL, check=True)
        return _read(Path(folder, "run", "metrics.jsonl"))


def _read(metrics: Path) -> Digests:
    """The digests of the weights after each step, and of the metrics of each evaluation."""
    run_digests = {}
    for row in map(json.loads, metrics.read_text().splitlines()):
        if row["kind"] == "weights":
            run_digests[f"step {row['step']}"] = _digest(row["digests"])
        elif row["kind"] == "eval":
            numbers = {key: value for key, value in row.items() if key != "kind"}
            run_digests[f"evaluation after step {row['step']}"] = _digest(numbers)
    return run_digests


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def difference(expected: Digests, found: Digests) -> str:
    """A sentence on where two runs first differ, "" where they do not."""
    for name, digest in expected.items():
        if found.get(name) != digest:
            return f"first different at {name}: {digest} expected, {found.get(name, 'nothing')} computed"
    return "" if expected.keys() == found.keys() else f"more than expected: {min(found.keys() - expected.keys())}"


def _environment(repository: Path = REPOSITORY) -> dict[str, str]:
    """Environment variables for a training with the code in `repository`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}


def _checkout(commit: str) -> Path:
    """A folder with the files of a commit. Raises CalledProcessError, after git's message."""
    asked = ["git", "-C", str(REPOSITORY), "rev-parse", "--verify", f"{commit}^{{commit}}"]
    sha = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    folder = BUILD / sha
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            archive = subprocess.run(["git", "-C", str(REPOSITORY), "archive", sha], stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "-x", "-C", partial], input=archive.stdout, check=True)
            Path(partial).replace(folder)
            Path(partial).mkdir()
    return folder


def compare(commit: str, names: Sequence[str]) -> int:
    """Compare the working tree with a commit, and print a line for each run. Returns the number that differ."""
    other = _checkout(commit)
    different = 0
    for name in names:
        ranks = RUNS[name].ranks[-1]
        why = difference(digests(name, ranks, other), digests(name, ranks))
        different += bool(why)
        print(f"{name}: {why or f'the same bits as {commit}'}", flush=True)
    return different


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 for the same bits, 1 for others, 2 without stored digests."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)} (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--write", action="store_true", help="store the digests of this machine")
    form.add_argument("--compare", metavar="COMMIT", help="compare with a commit instead of the stored digests")
    args = parser.parse_args(arguments)
    names = args.runs or [*RUNS]
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"{unknown[0]}: there is no such run; choose of {', '.join(RUNS)}")
    if args.compare:
        return int(compare(args.compare, names) > 0)
    machine = this_machine()
    known = stored(machine) or {}
    different = missing = 0
    for name in names:
        first, *others = RUNS[name].ranks
        found = digests(name, first)
        why = difference(known[name], found) if name in known and not args.write else ""
        for ranks in others:
            if differs := difference(found, digests(name, ranks)):
                why = f"on {ranks} ranks {differs}"
        different += bool(why)
        missing += name not in known
        if args.write and not why:
            write(machine, {name: found})
        print(
            f"{name}: {why or ('stored' if args.write else 'the same' if name in known else 'not stored')}", flush=True
        )
    print(machine)
    return 1 if different else 2 if missing and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
