"""Draw the plots of a run folder again, from its metrics.jsonl alone.

    dist-train plots runs/block94-seed0-1a2b3c4d

The run need not be finished.
"""

from __future__ import annotations

from pathlib import Path

from dist_train.command_line import Parser, command
from dist_train.errors import DONE, UserError, show
from dist_train.reports.plots import draw


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = Parser("plots", __doc__)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--dataset", default="", help="name for the titles (default: from config.toml)")
    options = parser.parse_args(arguments)
    try:
        paths = draw(options.run_dir, dataset=options.dataset)
    except OSError as error:
        raise UserError(f"{options.run_dir}: the plots cannot be written ({error.strerror}); make room") from None
    show(*map(str, paths))
    return DONE
