"""Where two runs first differ: made-up run folders, each with one difference, and real runs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, SUMMARY

from dist_train import config
from dist_train.commands import diff
from dist_train.config.settings import RecordConfig
from dist_train.runs import checkpoint, layout
from dist_train.runs.history import append_history
from dist_train.runs.metrics import Row
from dist_train.training.recorder import Recorder

EPOCH = 5  # steps
NAMES = ("stem.weight", "blocks.0.fc.weight", "output.bias")
FINER = "to see more: they first differ between step {} and step {}; train both again, in new run folders, with "


def run(
    folder: Path,
    *,
    steps: int = 10,
    digest_every: int = EPOCH,
    save: tuple[int, ...] = (),
    finish: bool = True,
    settings: tuple[str, ...] = (),
    environments: tuple[tuple[int, Row], ...] = ((0, {"torch": "2.11.0", "device": "CPU"}),),
    parts_at: int = 99,
    touches: str = "",
    speed: float = 100.0,
) -> Path:
    """A run folder. From step `parts_at` on, what `touches` names is another: a key of a line, or one of NAMES and
    all behind it, or "momentum", which only checkpoints have."""
    recorder = Recorder(
        folder,
        RecordConfig(wandb="disabled", quiet=True),
        dataset="digits",
        run_config={},
        total_steps=steps,
        resume_step=0,
    )
    (folder / layout.SETTINGS).write_text(config.to_toml(config.load("digits", None, list(settings))))
    for step, environment in environments:
        append_history(folder, "start", step=step, world_size=1, environment=environment)
    sha256 = ""
    for step in range(1, steps + 1):
        parted = step >= parts_at
        changed = NAMES[NAMES.index(touches) :] if parted and touches in NAMES else ()
        model = {name: torch.full((3, 2), step + (name in changed) / 3) for name in NAMES}
        momentum = torch.tensor(step + (parted and touches == "momentum") / 3)
        row: Row = {"epoch": step / EPOCH, "loss": 1.0 / step, "lr": 0.1, "grad_norm": 1.0, "correct": step, "flops": 9}
        assessed: Row = {"test_loss": 2.0 / step, "test_accuracy": step / 20, "coefficients": [[[1.0, 0.0]]]}
        for values in (row, assessed):
            if parted and touches in values:
                values[touches] += 2.0**-52
        recorder.step(step=step, images=32, images_per_second=speed + step, **row)
        digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in model.items()}
        if digest_every and step % digest_every == 0:
            recorder.weights(step=step, digests={name: digest[:16] for name, digest in digests.items()})
        if step % EPOCH == 0:
            recorder.eval(step=step, epoch=step // EPOCH, **assessed)
        if step in save:
            optimizers = [{"state": {0: {"momentum": momentum}}, "param_groups": [{"lr": 0.1}]}]
            state = {"step": step, "model": model, "optimizers": optimizers, "written_by": folder.name}
            checkpoint.save(layout.checkpoint_folder(folder), step, state, keep=9)
        sha256 = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    if finish:
        recorder.finish({**SUMMARY, "weights_sha256": sha256})
    recorder.close(0)
    return folder


@pytest.fixture
def verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Compare a straight run with another, both given by what `run` takes; a pair is one thing for each."""

    def compared(**options: Any) -> tuple[int, list[str]]:
        each = [{k: v[i] if isinstance(v, list) else v for k, v in options.items()} for i in (0, 1)]
        folders = [str(run(tmp_path / name, **values)) for name, values in zip("ab", each, strict=True)]
        code = diff.main(folders)
        out, err = capsys.readouterr()
        assert err == ""
        return code, out.replace(f"{tmp_path}/", "").splitlines()

    return compared


Verdict = Callable[..., tuple[int, list[str]]]


def test_same_bits_at_another_speed(verdict: Verdict) -> None:
    code, (line,) = verdict(speed=[100.0, 50.0], settings=[(), ("record.tags=[]", "checkpoint.keep=5")])
    assert code == 0
    assert line.startswith("same: 10 steps, 2 evaluations, final weights ")
    assert len(line.split()[-1]) == 64


@pytest.mark.parametrize(
    ("key", "first", "values"),
    [
        ("loss", "at step 7", f"loss {1 / 7!r} and {1 / 7 + 2.0**-52!r}"),
        ("lr", "at step 7", f"lr 0.1 and {0.1 + 2.0**-52!r}"),
        ("test_loss", "at the evaluation after step 10", f"test_loss 0.2 and {0.2 + 2.0**-52!r}"),
    ],
)
def test_one_bit_of_a_line(verdict: Verdict, key: str, first: str, values: str) -> None:
    code, lines = verdict(digest_every=1, parts_at=[99, 7], touches=key)
    assert code == 1
    assert lines[0].startswith(f"different: first {first}: {values}")
    assert lines[1:] == ["weights: equal at step 10, the last with digests or a checkpoint in both runs"]


def test_tensors_are_named_in_the_order_of_the_network(verdict: Verdict) -> None:
    code, lines = verdict(digest_every=1, parts_at=[99, 7], touches="blocks.0.fc.weight")
    assert code == 1
    assert lines == [
        "different: first in the weights after step 7",
        "weights: first seen different at step 7 (equal at step 6) in blocks.0.fc.weight and 1 other",
    ]


def test_coarse_digests_bound_the_first_different_step(verdict: Verdict) -> None:
    code, lines = verdict(parts_at=[99, 7], touches="stem.weight")
    assert code == 1
    assert lines == [
        "different: first in the weights after step 10",
        "weights: first seen different at step 10 (equal at step 5) in stem.weight and 2 others",
        FINER.format(5, 10) + "record.digest_every=1",
    ]


def test_digests_of_different_steps_are_not_compared(verdict: Verdict) -> None:
    code, lines = verdict(digest_every=[3, 4], finish=False)
    assert code == 0
    assert lines == [
        "same up to step 10, with 2 evaluations: neither has a later one",
        "weights: not compared, no step has digests or a checkpoint in both runs",
    ]


def test_the_final_digest_where_nothing_else_can_be_compared(verdict: Verdict) -> None:
    code, lines = verdict(digest_every=0, parts_at=[99, 7], touches="output.bias")
    assert code == 1
    assert lines[0].startswith("different: first in the final weights, after step 10: ")
    assert lines[1] == "weights: first seen different at step 10 (not compared before)"


def test_checkpoints_are_compared_where_digests_are_missing(verdict: Verdict) -> None:
    code, lines = verdict(digest_every=0, save=(3, 6, 8), parts_at=[99, 7], touches="output.bias")
    assert code == 1
    assert lines[:2] == [
        "different: first in the weights after step 8",
        "weights: first seen different at step 8 (equal at step 6) in output.bias",
    ]


def test_optimizer_state_is_compared(verdict: Verdict) -> None:
    code, lines = verdict(save=(5, 10), parts_at=[99, 7], touches="momentum")
    assert code == 1
    name = "optimizers.0.state.0.momentum"
    assert lines[:2] == [
        "different: first in the optimizer state after step 10",
        f"optimizer state: first seen different at step 10 (equal at step 5) in {name}",
    ]


@pytest.mark.parametrize("reason", ["it does not match its checksum", "Weights only load failed"])
def test_unreadable_checkpoint_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    a, b = (run(tmp_path / name, digest_every=0, save=(5, 7), finish=False) for name in "ab")
    path = layout.checkpoint_path(layout.checkpoint_folder(b), 7)
    if reason.startswith("Weights"):
        checkpoint.save(path.parent, 7, {"step": 7, "model": path}, keep=9)  # of a type that is not taken
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert diff.main([str(a), str(b)]) == 0
    out, err = capsys.readouterr()
    assert "weights: equal at step 5, the last" in out
    (sentence,) = err.splitlines()
    assert sentence.startswith(f"dist_train: {path} is not compared ({reason}")


def test_unfinished_run_is_the_same_up_to_its_last_step(verdict: Verdict) -> None:
    code, lines = verdict(steps=[12, 8], finish=[True, False])
    assert code == 0
    assert lines == [
        "same up to step 8, with 1 evaluation: b ends there so far",
        "weights: equal at step 5, the last with digests or a checkpoint in both runs",
    ]


def test_finished_run_that_is_shorter_is_different(verdict: Verdict) -> None:
    code, lines = verdict(steps=[10, 12], finish=[True, False])
    assert code == 1
    assert lines[0] == "different: first at step 11: b has it, a is finished before"


def test_causes_are_named(verdict: Verdict) -> None:
    old, new = {"torch": "2.11.0", "device": "CPU"}, {"torch": "2.15.0", "device": "CPU"}
    code, lines = verdict(
        parts_at=[99, 7],
        touches="loss",
        settings=[("seed=1",), ("model.blocks.0.channels=16", "record.quiet=true")],
        environments=[((0, old), (5, new), (9, {"torch": "3.0"})), ((0, old),)],
    )
    assert code == 1
    assert lines[-3:] == [
        "setting: model.blocks.0.channels is 32 and 16",
        "setting: train.seed is 1 and 0",
        "environment: torch is 2.11.0, then 2.15.0 and 2.11.0",
    ]


@pytest.mark.parametrize("wrong", ["absent", "empty", "damaged", "no step"])
def test_bad_input_is_one_sentence(tmp_path: Path, wrong: str) -> None:
    """Through the command as it is typed."""
    good, bad = run(tmp_path / "good"), tmp_path / "bad"
    if wrong != "absent":
        bad.mkdir()
    if wrong in ("damaged", "no step"):
        content = (good / "metrics.jsonl").read_text()
        (bad / "metrics.jsonl").write_text("" if wrong == "no step" else content.replace("{", "[", 1))
    command = [sys.executable, "-m", "dist_train", "diff", str(good), str(bad)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"dist_train: {bad}")


def test_real_runs(train: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train("alone")
    train("two", ranks=2)
    train("seeded", "seed=1")
    assert diff.main([str(tmp_path / "alone"), str(tmp_path / "two")]) == 0
    same = f"same: {summary['steps']} steps, 2 evaluations, final weights {summary['weights_sha256']}\n"
    assert capsys.readouterr() == (same, "")
    assert diff.main([str(tmp_path / "alone"), str(tmp_path / "seeded")]) == 1
    first, weights, *causes = capsys.readouterr().out.splitlines()
    assert first.startswith("different: first at step 1: loss ")
    assert weights.startswith(f"weights: first seen different at step {summary['steps'] // 2} (not compared before) in")
    assert causes == ["setting: train.seed is 0 and 1"]
