"""One or several runs as one HTML page that opens anywhere, without a server and without a network.

    dist-train report RUN... [--out report.html] [--title "What it is about"]

RUN is a run folder, or a folder of run folders as an array of jobs makes it. Runs that differ only in the seed are one
row of the table, as in `dist-train table`. Runs need not be finished: the page lists what is missing. A damaged
run is named, and the others are shown; the exit code is then 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dist_train.command_line import Parser, command
from dist_train.errors import DONE, FAILED, UserError, say, show
from dist_train.files import write_atomic
from dist_train.reports.page import GENERATOR, page

_HEAD = 2000  # bytes of a page in which GENERATOR is


def _is_own(path: Path) -> bool:
    """Whether a path is free, or has a page of this command. Raises UserError."""
    if not os.path.lexists(path):
        return True
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(_HEAD)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be read ({error.strerror}); name another file") from None


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 1 where a run is damaged."""
    parser = Parser("report", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder, or a folder of run folders")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="(default: %(default)s)")
    parser.add_argument("--title", metavar="TEXT", default="", help="(default: the runs' names)")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    out: Path = options.out
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}; make it, or name another")
    if not _is_own(out):
        raise UserError(
            f"--out {out}: is there, and was not written by dist-train report; name another file with --out"
        )
    html, damaged = page(options.runs, options.title, ["dist-train", "report", *arguments])
    content = html.encode(errors="backslashreplace")  # names of folders need not be valid text
    try:
        write_atomic(out, content)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from None
    show(f"{out} ({len(content) / 1e6:.1f} MB): open it in a browser")
    for each in damaged:
        say(str(each))
    return FAILED if damaged else DONE
