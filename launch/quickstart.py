"""Train over everything this machine has.

    python -m dist_train.launch.quickstart [arguments of python -m dist_train.main]

Without a network and without $CIFAR10_DIR it trains the preset `digits` instead, and says so.
"""

from __future__ import annotations

import os
import sys

from dist_train import config, data_prep
from dist_train.errors import BAD_INPUT, UserError, say
from dist_train.launch.node import Place, local_ranks, torchrun
from dist_train.main import parser, resolve


def main() -> int:
    arguments = sys.argv[1:]
    try:
        args = parser().parse_intermixed_args(arguments)
        _, settings = resolve(args)
        if not args.preset and not args.config:
            try:
                settings.data.prepare()  # before the ranks do, which have no other choice
            except data_prep.NoNetworkError as error:
                say(str(error))
                say("NOT CIFAR-10: training on scikit-learn's handwritten digits instead (--preset digits)")
                arguments = ["--preset", "digits", *arguments]
                settings = config.load("digits", None, args.settings)
        here = Place(0, 1, len(os.sched_getaffinity(0)), "alone")
        command = torchrun(arguments, local_ranks(settings.train, 1, here.cpus), here)
    except (UserError, data_prep.DataError) as error:
        say(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.train.threads))
    return os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
