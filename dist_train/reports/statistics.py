"""Statistics over runs and images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from dist_train.runs.metrics import Row


def often_taken_for(details: Row, names: Sequence[str]) -> list[str]:
    """For each class of an `evaluation.json` the class that its images are most often mistaken for, as `dog (12)` with
    the number of images; empty for a class without mistakes. names: the classes, as they are to be written."""
    mistakes = []
    for number, row in enumerate(details["confusion"]):
        wrong = [*row[:number], 0, *row[number + 1 :]]
        mistakes.append(f"{names[wrong.index(max(wrong))]} ({max(wrong)})" if any(wrong) else "")
    return mistakes


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval by Student's t, infinite for one value."""
    from scipy.stats import t as student  # takes a second, and most nodes of a job do not need it

    n = len(values)
    if n < 2:
        return math.inf
    return float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, standard deviation and 95 % interval as Markdown with this number of decimals; of one value that value, of
    none an empty text."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    half = interval(values)
    ends = f"{mean - half:.{digits}f} to {mean + half:.{digits}f}"
    return f"**{mean:.{digits}f}** ± {statistics.stdev(values):.{digits}f} (95 %: {ends})"


def proportion(right: int, n: int) -> tuple[float, float]:
    """The ends, from 0 to 1, of Wilson's 95 % interval for a proportion of which `right` of `n` trials are a sample."""
    from scipy.stats import binomtest

    ends = binomtest(right, n).proportion_ci(0.95, "wilson")
    return float(ends.low), float(ends.high)
