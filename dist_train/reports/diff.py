"""Compares two runs bit by bit, and finds where they first differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dist_train import config
from dist_train.config.trees import leaves
from dist_train.errors import UserError, first_line, say
from dist_train.runs.contents import read_checksum
from dist_train.runs.layout import METRICS
from dist_train.runs.metrics import Row
from dist_train.runs.run import Run


class ComparedRun:
    """The values of a run that are compared, by step. Raises UserError for a folder without a finished step."""

    def __init__(self, folder: Path) -> None:
        self.run, self.folder = Run(folder), folder
        self.run.need(METRICS)
        if not self.run.steps:
            raise UserError(f"{folder} has no finished step yet: there is nothing to compare")
        self.steps = {row["step"]: row for row in self.run.steps}
        self.evals = {row["step"]: row for row in self.run.evals}
        self.last: int = self.run.steps[-1]["step"]
        self.digests, self.checkpoints = self.run.digests, self.run.checkpoints
        # SHA-256 of the final weights; None before the run's end
        self.final: str | None = self.run.summary.get("weights_sha256")

    def checksum(self, step: int) -> str | None:
        """SHA-256 of the checkpoint after `step`; None where there is none."""
        return read_checksum(self.checkpoints[step]) if step in self.checkpoints else None

    def tensor_digests(self, step: int) -> dict[str, str] | None:
        """The digests of the checkpoint after `step`, by tensor. None, and a line on stderr, where it cannot be
        read."""
        from dist_train.runs import checkpoint  # imports torch, which takes seconds and is not needed for equal runs

        path = self.checkpoints[step]
        try:
            if why := checkpoint.wrong(path):
                raise ValueError(f"it {why}")
            return checkpoint.tensor_digests(checkpoint.Checkpoint.from_dict(checkpoint.load(path)))
        except Exception as error:  # an unfinished run may have removed it, another version may have written it
            reason = first_line(error)
            say(f"{path} is not compared ({reason})")
            return None


class Difference(NamedTuple):
    """A difference between two runs. The least of several is the earliest."""

    step: int
    phase: int  # 0: the step itself, 1: the weights after it, 2: the final weights, 3: the evaluation
    words: str


class Weights(NamedTuple):
    """The comparison of the weights. equal: the last step after which they were compared and equal, 0 for none.
    different: the first after which they differ, 0 for none. names: the tensors that differ after that, empty where
    only the digests of the final weights could be compared."""

    equal: int
    different: int
    names: list[str]

    @property
    def kind(self) -> str:
        """What differs: the weights, or only the optimizer state."""
        return "optimizer state" if self.names and self.names[0].startswith("optimizers.") else "weights"

    def __str__(self) -> str:
        if self.different:
            before = f"equal at step {self.equal}" if self.equal else "not compared before"
            where = f" in {self.names[0]}" if self.names else ""
            if others := len(self.names) - 1 if self.names else 0:
                where += f" and {others} other{'s' * (others > 1)}"
            return f"{self.kind}: first seen different at step {self.different} ({before}){where}"
        if self.equal:
            return f"weights: equal at step {self.equal}, the last with digests or a checkpoint in both runs"
        return "weights: not compared, no step has digests or a checkpoint in both runs"


def compare(a: ComparedRun, b: ComparedRun) -> tuple[bool, list[str]]:
    """Whether all that both runs have is equal, and the lines to print, the verdict first."""
    common = min(a.last, b.last)
    shorter, longer = sorted((a, b), key=lambda run: run.last)
    weights = _weights(a, b)
    differences = [*_rows(a.steps, b.steps, 0, "at"), *_rows(a.evals, b.evals, 3, "at the evaluation after")]
    if weights.names:
        differences.append(Difference(weights.different, 1, f"in the {weights.kind} after step {weights.different}"))
    elif weights.different:
        words = f"in the final weights, after step {weights.different}: {a.final} and {b.final}"
        differences.append(Difference(weights.different, 2, words))
    if shorter.last < longer.last and shorter.run.done:
        words = f"at step {common + 1}: {longer.folder} has it, {shorter.folder} is finished before"
        differences.append(Difference(common + 1, 0, words))
    if differences:
        first = min(differences)
        lines = [f"different: first {first.words}", str(weights)]
        if weights.equal + 1 < first.step <= common:
            lines.append(
                f"to see more: they first differ between step {weights.equal} and step {first.step}; train both again, "
                f"in new run folders, with record.digest_every=1"
            )
        return False, [*lines, *_settings(a.run, b.run), *_environment(a.run, b.run, first.step)]
    evals = len(a.evals.keys() & b.evals.keys())
    evaluations = f"{evals} evaluation{'s' * (evals != 1)}"
    if a.final and b.final:
        return True, [f"same: {common} steps, {evaluations}, final weights {a.final}"]
    ends = f"{shorter.folder} ends there so far" if shorter.last < longer.last else "neither has a later one"
    return True, [f"same up to step {common}, with {evaluations}: {ends}", str(weights)]


def _rows(a: dict[int, Row], b: dict[int, Row], phase: int, where: str) -> Iterator[Difference]:
    """The first difference between the lines of both runs, if any. a, b: lines by step."""
    for step in sorted(a.keys() & b.keys()):
        names = [name for name in _differing(a[step], b[step]) if name != "images_per_second"]
        if names:
            values = [f"{name} {a[step].get(name)!r} and {b[step].get(name)!r}" for name in names]
            yield Difference(step, phase, f"{where} step {step}: {', '.join(values)}")
            return


def _weights(a: ComparedRun, b: ComparedRun) -> Weights:
    """Compare the weights after every step with digests or a checkpoint in both runs, up to the first difference."""
    equal = 0
    for step in sorted(a.steps.keys() & b.steps.keys()):
        compared = step in a.digests and step in b.digests
        names = _differing(a.digests[step], b.digests[step]) if compared else []
        checksums = a.checksum(step), b.checksum(step)
        if not names and None not in checksums:
            # Checkpoints have the optimizer state too, which the digests of the weights do not cover. Files with equal
            # checksums need not be read; others may still have equal tensors.
            equal_files = checksums[0] == checksums[1]
            of_a, of_b = ({}, {}) if equal_files else (a.tensor_digests(step), b.tensor_digests(step))
            if of_a is not None and of_b is not None:
                compared, names = True, _differing(of_a, of_b)
        if names:
            return Weights(equal, step, names)
        if compared:
            equal = step
    if a.last == b.last and a.final and b.final:
        return Weights(a.last, 0, []) if a.final == b.final else Weights(equal, a.last, [])
    return Weights(equal, 0, [])


def _differing(a: Row, b: Row) -> list[str]:
    """The keys whose values differ between two dicts, in the order of the first."""
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def _settings(a: Run, b: Run) -> Iterator[str]:
    """A line for each setting that differs and that the weights depend on."""
    try:
        settings_a, settings_b = a.settings, b.settings
    except UserError as error:
        yield f"settings: not compared; {error}"
        return
    values = [dict(leaves(config.to_dict(settings))) for settings in (settings_a, settings_b)]
    for key in config.difference(settings_a, settings_b):
        yield f"setting: {key} is {values[0].get(key)!r} and {values[1].get(key)!r}"


def _environment(a: Run, b: Run, before: int) -> Iterator[str]:
    """A line for each part of the environment that differs between the runs. A run that was resumed may have several
    values of it."""
    of_a, of_b = a.environment(before), b.environment(before)
    for name in {**of_a, **of_b} if of_a and of_b else ():
        values = [", then ".join(map(str, environment.get(name, ["not recorded"]))) for environment in (of_a, of_b)]
        if values[0] != values[1]:
            yield f"environment: {name} is {values[0]} and {values[1]}"
