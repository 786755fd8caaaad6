"""What a reduction costs on the wire: the formula, and bytes counted."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import REPOSITORY, environment

from dist_train.distributed.gradient_sum import cost

ELEMENTS = 200_000
NO_NAMESPACE = 77  # exit code of the benchmark


@pytest.mark.parametrize("world_size", range(1, 10))
@pytest.mark.parametrize("elements", [1, 7, 200_000])
def test_one_microbatch_a_rank_costs_the_bytes_of_a_ring_all_reduce(elements: int, world_size: int) -> None:
    found = cost(elements, world_size, world_size)
    slice_ = 4 * -(-elements // world_size)
    assert found.sent == found.received == 2 * (world_size - 1) * slice_
    assert found.messages == 2 * (world_size - 1)


def test_counted_bytes_are_those_of_the_formula() -> None:
    """On a loopback that nobody else uses; both ways with their headers, barriers and signs of life."""
    command = [sys.executable, "-m", "benchmarks.reduction", "--bytes"]
    command += ["--elements", str(ELEMENTS), "--ranks", "2", "3", "--steps", "5"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120)
    if done.returncode == NO_NAMESPACE:
        pytest.skip(f"{done.stderr.strip()}: run as root")
    assert done.returncode == 0, done.stderr
    found: dict[tuple[int, int], list[int]] = {}
    for line in done.stdout.splitlines():
        cells = [cell.split("(")[0].strip().replace(",", "") for cell in line.strip("| ").split("|")]
        if cells[0].isdigit():
            found[int(cells[0]), int(cells[1])] = [int(cells[index]) for index in (2, 3, 5, 6)]

    half, third = 4 * 100_000, 4 * 66_667
    expected = {  # of all ranks together: (ring all-reduce, fixed order)
        (2, 8): (2 * 2 * half, 2 * 2 * half),
        (2, 2): (2 * 2 * half, 2 * 2 * half),
        # Microbatches 0 1 | 2 3 4 | 5 6 7: one whole branch and twice two. A slice of each goes to two other ranks,
        # and then each of the three sums does.
        (3, 8): (3 * 4 * third, (1 + 2 + 2) * 2 * third + 3 * 2 * third),
        (3, 3): (3 * 4 * third, 3 * 4 * third),
    }
    assert found.keys() == expected.keys()
    for (world_size, microbatches), formulas in expected.items():
        ring, counted_ring, fixed, counted_fixed = found[world_size, microbatches]
        assert (ring, fixed) == formulas
        for formula, counted in ((ring, counted_ring), (fixed, counted_fixed)):
            assert formula < counted < 1.02 * formula + 20_000
        busiest = cost(ELEMENTS, microbatches, world_size).sent
        assert fixed <= world_size * busiest
        assert (fixed == world_size * busiest) == ((world_size, microbatches) != (3, 8))
