"""Prepare the data set that a configuration names, then train over everything this machine has.

    python -m dist_train.launch.quickstart [arguments of python -m dist_train.main]

Without a network and without $CIFAR10_DIR it trains the preset `digits` instead, and says so.
"""

from __future__ import annotations

import os
import sys

from dist_train import config, data_prep
from dist_train.errors import UserError
from dist_train.launch.node import Place, local_ranks, torchrun
from dist_train.main import parser, resolve


def main() -> int:
    arguments = sys.argv[1:]
    args = parser().parse_intermixed_args(arguments)
    try:
        _, settings = resolve(args)
        try:
            settings.data.prepare()
        except data_prep.NoNetworkError as error:
            if args.preset or args.config:
                raise
            print(
                f"quickstart: {error}\n"
                f"quickstart: NOT CIFAR-10: training on scikit-learn's handwritten digits instead (--preset digits)",
                file=sys.stderr,
            )
            arguments = ["--preset", "digits", *arguments]
            settings = config.load("digits", None, args.settings)
            settings.data.prepare()
        here = Place(0, 1, len(os.sched_getaffinity(0)), "alone")
        command = torchrun(arguments, local_ranks(settings.train, 1, here.cpus), here)
    except (UserError, data_prep.DataError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.train.threads))
    return os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
