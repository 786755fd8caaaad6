"""The W&B workspace of a project: panels for what its runs log, defined in code.

    dist-train dashboard
    dist-train dashboard --project my-project --entity team --blocks 9

Saving needs a login (wandb login). The same command again updates the workspace of that name, and undoes manual changes
in its sections.
"""

from __future__ import annotations

import argparse
import json

from dist_train.command_line import Parser, command, count
from dist_train.config.settings import RecordConfig
from dist_train.errors import DONE, show
from dist_train.tracking.dashboard import BLOCKS, NAME, save, workspace
from dist_train.tracking.variables import PROJECT, resolved


def _parser() -> argparse.ArgumentParser:
    parser = Parser("dashboard", __doc__)
    add = parser.add_argument
    add("--project", help=f"W&B project (default: $WANDB_PROJECT, else {PROJECT})")
    add("--entity", metavar="E", default="", help="W&B user or team of the project (default: the account's own)")
    add("--name", default=NAME, help="name of the workspace (default: %(default)s)")
    add(
        "--blocks",
        metavar="N",
        type=count,
        default=BLOCKS,
        help="number of blocks with a panel (default: %(default)s, as block94 has)",
    )
    add("--json", action="store_true", help="print the definition and save nothing; needs no account")
    return parser


@command
def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = _parser().parse_args(arguments)
    project = resolved(RecordConfig(wandb="online", project=args.project or ""), "--project").project
    view = workspace(project, args.entity, args.name, args.blocks)
    if args.json:
        print(json.dumps(view._to_model().model_dump(by_alias=True, exclude_none=True), indent=1))
    else:
        show(save(view))
    return DONE
