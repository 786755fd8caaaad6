"""torchrun, with the same options, that lets the ranks save before they stop, and print their own errors.

    python -m dist_train.launch.agent --nnodes=2 --node-rank=0 ... -m dist_train.main ...

It forwards stop signals to the ranks and waits until they have saved: torchrun would kill them after 30 seconds, and
SIGUSR1, which Slurm sends to every process of a job, would end torchrun itself. After 2.9 torchrun has options for both
(--shutdown-timeout, --signals-to-handle). It has none that keeps the exit code of bad input, or that keeps torchrun's
tracebacks out of the log, where a failed rank has printed its own error, unless a signal ended it.
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

from dist_train.errors import BAD_INPUT, DONE, FAILED, PREEMPTED, say
from dist_train.signals import SIGNALS, ignore_at_exit


def main() -> int:
    """Run the ranks. Returns the exit code: 0 when all ranks have returned 0, that of the first which has not where it
    is for bad input or a stop, otherwise 1. A stop signal before the ranks start exits with 128 and its number."""
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
    args.signals_to_handle = "SIGQUIT"  # torchrun handles no stop signal itself; it requires at least one
    try:
        run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and not stopped:
            name = signal.Signals(-failure.exitcode).name
            say(f"rank {rank} (process {failure.pid}) was ended by {name}")
        return failure.exitcode if failure.exitcode in (BAD_INPUT, PREEMPTED) else FAILED
    return DONE


def _children() -> set[int]:
    """Process ids of this process's children, which are the ranks."""
    pids: set[int] = set()
    for thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            pids.update(map(int, thread.read_text(encoding="utf-8").split()))
    return pids


if __name__ == "__main__":
    sys.exit(main())
