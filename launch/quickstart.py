"""Train on all GPUs of this machine, or else on its CPUs.

    dist-train quickstart [arguments of python -m dist_train.main]

Without a network and without $CIFAR10_DIR it trains the preset `digits` instead, after a message.
"""

from __future__ import annotations

import os
import sys

from dist_train import config, data_prep
from dist_train.command_line import command
from dist_train.config.arguments import parser, resolve
from dist_train.data import dataset
from dist_train.distributed.launcher import without_launcher
from dist_train.errors import say
from dist_train.launch.node import JobNode, local_ranks, start_ranks


@command
def main(arguments: list[str] | None = None) -> int:
    """Replace this process by the ranks' torchrun, or by the only rank. Returns the exit code where it stops before."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_intermixed_args(given)
    _, settings = resolve(args)
    if not args.preset and not args.config:
        try:
            dataset.prepare(settings.data)  # here, because the ranks could not change the data set
        except data_prep.NoNetworkError as error:
            say(str(error))
            say("NOT CIFAR-10: training on scikit-learn's handwritten digits instead (--preset digits)")
            given = ["--preset", "digits", *given]
            settings = config.load("digits", None, args.settings)
        except KeyboardInterrupt:
            return 130
    this_node = JobNode(0, 1, len(os.sched_getaffinity(0)), "alone")
    command_line = start_ranks(given, local_ranks(settings.train, 1, this_node.cpus), this_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.train.threads))
    return os.execve(sys.executable, command_line, without_launcher())


if __name__ == "__main__":
    sys.exit(main())
