"""torchrun, with its own options, that leaves stopping and the last word to the ranks.

    python -m dist_train.launch.agent --nnodes=2 --node-rank=0 ... -m dist_train.main ...

It passes stop signals on to the ranks and waits for them, however long they take to save: torchrun would kill them
after 30 seconds, and SIGUSR1, which Slurm sends to every process of a job, would end torchrun itself. torchrun has had
options for both after 2.9 (--shutdown-timeout, --signals-to-handle); no option keeps the exit code of bad input, or
its tracebacks out of the log: a rank that fails has printed why, unless a signal ended it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from dist_train.errors import BAD_INPUT, DONE, FAILED, say
from dist_train.signals import SIGNALS, ignore_at_exit


def main() -> int:
    """Returns 0 when all ranks have done their work, 2 when the first to leave says that the input is bad, otherwise 1;
    128 and a signal's number when that came before them."""
    stopped = False

    def stop(number: int, _: object) -> None:
        nonlocal stopped
        stopped = True
        ranks = _children()
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if not ranks:
            raise SystemExit(128 + number)

    for number in SIGNALS:
        signal.signal(number, stop)
    ignore_at_exit()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    args = parse_args(sys.argv[1:])
    args.signals_to_handle = "SIGQUIT"  # of torchrun's own handlers; one it must have
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and not stopped:
            ended = signal.Signals(-failure.exitcode).name
            say(f"rank {rank} (process {failure.pid}) was ended by {ended}")
        return BAD_INPUT if failure.exitcode == BAD_INPUT else FAILED
    return DONE


def _children() -> set[int]:
    found: set[int] = set()
    for thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found.update(map(int, thread.read_text().split()))
    return found


if __name__ == "__main__":
    sys.exit(main())
