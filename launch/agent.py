"""torchrun, with its own options, that leaves the last word to the ranks.

    python -m launch.agent --nnodes=2 --node-rank=0 ... -m dist_train.main ...

torchrun ends every failure, and every stop, with tracebacks of its own. A rank that fails has said why; only of one
that could not, a signal having ended it, something is left to say.
"""

from __future__ import annotations

import logging
import sys
from signal import Signals

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from dist_train.errors import say


def main() -> int:
    """Returns 0 when all ranks have done their work, 1 when one failed, 128 and the signal's number after a signal."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            say(f"rank {rank} (process {failure.pid}) was ended by {Signals(-failure.exitcode).name}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
