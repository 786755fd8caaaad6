"""dist-train COMMAND, the same as python -m dist_train COMMAND."""

from __future__ import annotations

import difflib
import importlib
import sys

from dist_train import __version__
from dist_train.command_line import command
from dist_train.commands import COMMANDS, ON_EVERY_RANK
from dist_train.distributed.launcher import launched_as
from dist_train.errors import UserError


def usage() -> str:
    """What `dist-train --help` prints: a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dist-train COMMAND [arguments]",
            "",
            "Train block networks on CIFAR-10, with the same weights, bit for bit, on any number of workers.",
            "",
            "commands:",
            *lines,
            "",
            "dist-train COMMAND --help describes one of them; dist-train --version prints the version.",
            "For several ranks: torchrun --nproc_per_node=4 -m dist_train COMMAND, with train or evaluate.",
        ]
    )


@command
def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = given
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        raise UserError(
            f"{name or repr(name)}: there is no such command; {f'did you mean {close[0]}?' if close else 'see --help'}"
        )
    if name in ON_EVERY_RANK:
        launched_as()  # before the command's module imports torch
    if name == "train":
        return _train(rest)
    code: int = importlib.import_module(COMMANDS[name].module).main(rest)
    return code


def _train(arguments: list[str]) -> int:
    from dist_train.signals import hold_back

    hold_back()  # before the imports of the trainer
    from dist_train.main import entry

    return entry(arguments)


if __name__ == "__main__":
    sys.exit(main())
