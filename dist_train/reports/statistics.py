"""Statistics over runs and images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from dist_train.runs.metrics import Row


def often_taken_for(details: Row) -> list[str]:
    """Of each class in an `evaluation.json`: the class that most of its wrong answers name, and how many do."""
    found = []
    for number, row in enumerate(details["confusion"]):
        wrong = [*row[:number], 0, *row[number + 1 :]]
        found.append(f"{details['classes'][wrong.index(max(wrong))]} ({max(wrong)})" if any(wrong) else "")
    return found


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval by Student's t, infinite for one value."""
    from scipy.stats import t as student  # a second, which not every node of a job has to spend

    n = len(values)
    if n < 2:
        return math.inf
    return float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def proportion(right: int, n: int) -> tuple[float, float]:
    """The ends of the 95 % interval by Wilson of the chance of which `right` of `n` trials are a sample."""
    from scipy.stats import binomtest

    found = binomtest(right, n).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)
