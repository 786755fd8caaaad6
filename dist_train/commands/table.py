"""The runs of a group side by side: accuracy as mean, standard deviation and 95 % interval over the seeds.

    dist-train table GROUP

GROUP is a folder of run folders, as an array of jobs makes it. Runs that differ in more than the seed get a row for
each of their configurations. Unfinished runs are listed below the table, which has the results of the others.
"""

from __future__ import annotations

from pathlib import Path

from dist_train.command_line import Parser, command
from dist_train.errors import DONE, FAILED, say, show
from dist_train.reports.table import write


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 1 where a run is damaged."""
    parser = Parser("table", __doc__)
    parser.add_argument("group", metavar="GROUP", type=Path, help="a folder of run folders")
    text, damaged = write(parser.parse_args(arguments).group)
    show(*text.splitlines())
    for error in damaged:
        say(str(error))
    return FAILED if damaged else DONE
