"""Elastic training: hosts come and go, torchrun's launchers continue with those that remain, and the weights do
not know. The rendezvous store has a host of its own, so that any training host may go, that of rank 0 too."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import REPOSITORY, TINY, environment, lines
from hosts import Hosts, hosts

STORE = """
import signal
from torch.distributed import TCPStore
store = TCPStore("node0", 29400, is_master=True, wait_for_workers=False)
signal.pause()
"""
RENDEZVOUS = {
    "is_host": 0,  # no launcher is to hold the store
    "last_call_timeout": 3,  # seconds that those who are there wait for more
    "keep_alive_interval": 1,
    "keep_alive_max_attempt": 6,  # intervals without a sign of life after which a host is gone
}
ENVIRONMENT = {
    # else the launchers keep to the trainers' store of the first round, whose host may be gone
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # no C++ stack for each connection that breaks
}


class Training:
    """A run on some of the hosts, with host 0 for the store."""

    def __init__(self, network: Hosts, folder: Path, arguments: list[str]) -> None:
        """folder: the run folder; arguments: the trainer's, without it."""
        self.network, self.folder = network, folder
        self.log = folder.with_suffix(".log")  # of all hosts together, in the order of time
        self.arguments = [*arguments, "--run-dir", str(folder)]
        self._start(0, ["-c", STORE])

    def join(self, host: int) -> subprocess.Popen[bytes]:
        """Have a host take part, as soon as it reaches the store. Returns its launcher."""
        rendezvous = ",".join(f"{key}={value}" for key, value in RENDEZVOUS.items())
        where = ["--rdzv-backend=c10d", "--rdzv-endpoint=node0:29400", f"--rdzv-conf={rendezvous}"]
        sizes = ["--nnodes=1:4", "--nproc_per_node=1", "--max-restarts=20"]
        launcher = ["-m", "torch.distributed.run", *sizes, *where]
        return self._start(host, [*launcher, "-m", "dist_train.main", *self.arguments])

    def train_on(self, ranks: int) -> tuple[int, int]:
        """Wait until that many ranks train. Returns the last step before and the one that they resumed after."""
        before = len(self._starts())
        last = 0

        def started() -> bool:
            nonlocal last
            last = max(last, self._step())  # the record is cut back to the checkpoint
            return ranks in [size for size, _ in self._starts()[before:]]

        self.wait(f"start with {ranks} ranks", started)
        after = self._starts()[-1][1]
        self.wait(f"step with {ranks} ranks", lambda: self._step() > after + 2)
        return last, after

    def wait(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait for something to happen; the test fails, with the log, when it does not."""
        deadline = time.monotonic() + 120
        while not happened():
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()}"
            time.sleep(0.1)

    def _start(self, host: int, arguments: list[str]) -> subprocess.Popen[bytes]:
        command, env = [sys.executable, *arguments], {**environment(), **ENVIRONMENT}
        return self.network.start(host, command, cwd=REPOSITORY, env=env, log=self.log)

    def _starts(self) -> list[tuple[int, int]]:
        """The number of ranks and the step that they resumed after, for each time that training was started."""
        rows = map(json.loads, self._lines("history.jsonl"))
        return [(row["world_size"], row["step"]) for row in rows if row["event"] == "start"]

    def _step(self) -> int:
        """The last step that is recorded."""
        found = [json.loads(line)["step"] for line in self._lines("metrics.jsonl")]
        return max(found, default=0)

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []


def test_hosts_come_and_go_and_the_weights_are_the_same(
    digits: Path, train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = ["epochs=40", "every_steps=20", "timeout=10", "record.quiet=true"]
    folder = tmp_path / "elastic"
    with hosts(4) as network:
        run = Training(network, folder, ["--preset", "digits", f"data.dir={digits}", *TINY, *settings])
        network.unplug(1)  # its launcher starts here, so that it can join at once when the others train
        for host in (1, 2):
            run.join(host)
        last = run.join(3)
        run.train_on(2)

        network.plug(1)  # the first name in the alphabet: it becomes rank 0
        done, after = run.train_on(3)
        assert after >= done, "the others were asked to stop and lost steps"

        network.power_off(1)  # rank 0
        run.train_on(2)

        network.unplug(2)  # rank 0 of those that are left; the store of this round is with it
        run.train_on(1)

        run.wait("end", lambda: last.poll() is not None)
        assert last.returncode == 0, run.log.read_text()
    alone = train("alone", *settings)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == alone["weights_sha256"]
    assert lines(folder) == lines(tmp_path / "alone")
