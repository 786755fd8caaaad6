"""Compares two runs bit by bit, and prints where they first differ.

    dist-train diff RUN_A RUN_B

It compares every step that both runs have: its loss, correct count and learning rate, the weights after it (by their
digests, or by the checkpoints of both) and its evaluation; and the final weights. The runs need not be finished. Values
are printed in the order of the arguments. Exit code: 0 the same in all that both have; 1 different; 2 bad input.
"""

from __future__ import annotations

from pathlib import Path

from dist_train.command_line import Parser, command
from dist_train.errors import show
from dist_train.reports.diff import ComparedRun, compare


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = Parser("diff", __doc__)
    parser.add_argument("run_a", metavar="RUN_A", type=Path, help="a run folder")
    parser.add_argument("run_b", metavar="RUN_B", type=Path, help="another run folder")
    options = parser.parse_args(arguments)
    same, lines = compare(ComparedRun(options.run_a), ComparedRun(options.run_b))
    show(*lines)
    return 0 if same else 1
