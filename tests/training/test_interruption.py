"""Interrupted runs: the same command resumes them to the same bits, and reports what happened."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, TINY, command, environment, lines, trainer

from dist_train.runs import checkpoint
from dist_train.runs.history import read_history

Train = Callable[..., dict[str, Any]]
PREEMPTED = 75


def processes(folder: Path) -> dict[int, list[bytes]]:
    """The processes that have a run folder among their arguments: {process: its arguments}."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended
            if entry.name.isdigit():
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                if str(folder).encode() in arguments:
                    found[int(entry.name)] = arguments
    return found


def ranks_of(folder: Path) -> dict[int, int]:
    """The processes of the run in a folder: {rank: process}, with the launcher as rank -1."""
    found = {}
    for number, arguments in processes(folder).items():
        with suppress(OSError):
            environ = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            variables = dict(v.partition(b"=")[::2] for v in environ)
            launcher = b"torch.distributed.run" in arguments
            found[-1 if launcher else int(variables.get(b"RANK", b"0"))] = number
    return found


def listening(process: int) -> list[str]:
    """The addresses, in the kernel's hexadecimal, on which a process waits for connections."""
    opened = [str(entry.readlink()) for entry in Path(f"/proc/{process}/fd").iterdir()]
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in opened]


def begun(
    folder: Path,
    steps: int,
    *arguments: object,
    ranks: int = 1,
    torchrun: tuple[str, ...] = (),
    inside: Callable[[list[str]], list[str]] = list,
    module: str = "dist_train.main",
) -> subprocess.Popen[str]:
    """Start the trainer, or another module, and wait until that many steps are recorded. torchrun: more of its options.
    inside: makes of the command another, that starts it."""
    process = subprocess.Popen(
        inside(command(*arguments, "--run-dir", folder, ranks=ranks, torchrun=torchrun, module=module)),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    record = folder / "metrics.jsonl"
    while not record.exists() or record.read_text().count('"kind": "step"') < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def left(folder: Path, seconds: float) -> bool:
    """Whether every process of the run ends within that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not ranks_of(folder):
            return True
        time.sleep(0.05)
    return False


def test_stop_signals_a_killed_launcher_and_a_restart_on_changing_numbers_of_ranks(
    digits: Path, train: Train, tmp_path: Path
) -> None:
    undisturbed = train("undisturbed", "epochs=9")
    folder = tmp_path / "run"
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=9", "every_steps=3"]

    process = begun(folder, 5, *arguments, ranks=2)
    assert listening(ranks_of(folder)[-1])
    os.kill(ranks_of(folder)[1], signal.SIGUSR1)
    said, _ = process.communicate(timeout=20)
    assert "stopped by SIGUSR1 on rank 1 after step " in said
    assert said.count("exitcode  : 75") == 2
    assert "Traceback (most recent call last)" not in said.partition("stopped by")[0]
    stopped_at(folder)

    process = begun(folder, 13, *arguments)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == PREEMPTED
    assert "stopped by SIGTERM on rank 0 after step " in said
    stopped_at(folder)

    process = begun(folder, 20, *arguments, ranks=2)
    slow = ranks_of(folder)[1]
    os.kill(slow, signal.SIGSTOP)
    os.kill(ranks_of(folder)[-1], signal.SIGKILL)  # the launcher alone
    time.sleep(4)  # rank 0 loses the launcher's store, to which it sends its heartbeats
    os.kill(slow, signal.SIGCONT)
    assert left(folder, 20)
    said, _ = process.communicate()
    assert "stopped by SIGTERM on rank " in said
    assert "frame #" not in said
    stopped_at(folder)

    process = begun(folder, 26, *arguments, ranks=3, torchrun=("--max-restarts=3",))
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("resuming after step") == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]
    assert lines(folder) == lines(tmp_path / "undisturbed")
    history = read_history(folder)
    assert [row["outcome"] for row in history if row["event"] == "end"] == [*["preempted"] * 3, "failed", "done"]
    assert [row["world_size"] for row in history if row["event"] == "start"] == [2, 1, 2, 3, 3]
    same = subprocess.run(
        [sys.executable, "-m", "dist_train", "diff", folder, tmp_path / "undisturbed"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert same.returncode == 0, same.stdout
    assert same.stdout.startswith("same: 45 steps, 9 evaluations")
    again = trainer(*arguments, "--run-dir", folder)
    assert again.returncode == 0
    assert "is finished already" in again.stdout


def stopped_at(folder: Path) -> None:
    """All metrics are saved, and the history has the reason of the end."""
    recorded = max(row["step"] for row in lines(folder))
    assert checkpoint.steps(folder / "checkpoints")[-1] == recorded
    last = read_history(folder)[-1]
    assert (last["event"], last["outcome"], last["step"]) == ("end", "preempted", recorded)


def test_a_closed_terminal_loses_nothing(digits: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=40", "every_steps=1000"]
    alone, nohup = tmp_path / "alone", tmp_path / "nohup"
    # script's terminal ends with it, and what is still written there fails
    opened = ["env", "--default-signal=HUP", "script"]  # the tests themselves may run under nohup
    terminal = begun(alone, 5, *arguments, inside=lambda words: [*opened, "-qec", shlex.join(words), os.devnull])
    terminal.kill()
    assert left(alone, 20)
    terminal.communicate()
    stopped_at(alone)
    assert read_history(alone)[-1]["reason"] == "SIGHUP on rank 0"

    # torchrun handles the signal that nohup ignores, and passes it on
    process = begun(nohup, 5, *arguments, ranks=2, inside=lambda words: ["nohup", *words])
    for number in ranks_of(nohup).values():
        os.kill(number, signal.SIGHUP)
    said, _ = process.communicate(timeout=40)
    assert "stopped by SIGHUP on rank " in said
    stopped_at(nohup)

    process = begun(alone, 15, *arguments, inside=lambda words: ["nohup", *words])
    process.send_signal(signal.SIGHUP)
    steps = (alone / "metrics.jsonl").read_text().count('"kind": "step"')
    deadline = time.monotonic() + 60
    assert not listening(process.pid)  # one rank needs no connection
    while (alone / "metrics.jsonl").read_text().count('"kind": "step"') < steps + 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()


def test_stop_signals_at_the_very_end_come_too_late(digits: Path, tmp_path: Path) -> None:
    """Slurm's warning of the time limit goes to every process of a job, whatever that is about."""
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=1", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_train.launch.node", *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said, everyone = "", set()
    while "curves: " not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
        everyone |= {*processes(tmp_path / "run")}
    assert len(everyone) >= 4  # the node's, the launcher, its ranks
    while process.poll() is None:
        for number in everyone:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGUSR1)
        time.sleep(0.001)
    rest, _ = process.communicate()
    assert process.returncode == 0, said + rest
    assert read_history(tmp_path / "run")[-1]["outcome"] == "done"


@pytest.mark.parametrize("module", ["dist_train.main", "tests.silent_waits"])
def test_a_dead_rank_is_named(digits: Path, tmp_path: Path, module: str) -> None:
    """Also where no wait raises an error, nor takes the signals with which torchrun ends the ranks that are left."""
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=40"]
    process = begun(tmp_path / "killed", 5, *arguments, ranks=3, module=module)
    os.kill(ranks_of(tmp_path / "killed")[2], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.count("dist_train: ") == 1
    assert "dist_train: rank 2 (process " in said
    assert "is gone; rank 0 was waiting for it in step " in said
    assert "Traceback" not in said.partition("torch/distributed/elastic")[0]  # where the launcher's own words begin
    assert "exitcode  : -9" in said.partition("Root Cause")[2]
    end = read_history(tmp_path / "killed")[-1]
    assert (end["event"], end["outcome"]) == ("end", "failed")
    assert f"dist_train: {end['reason']}\n" in said


def test_a_failing_rank_shows_its_own_traceback(digits: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=40"]
    failing = subprocess.run(
        command(*arguments, "--run-dir", tmp_path / "failing", ranks=2, module="tests.failing_rank"),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert failing.returncode == 1
    assert failing.stdout.count("ValueError: out of luck on purpose\n") >= 1
    assert "rank      : 1 " in failing.stdout.partition("Root Cause")[2]
    assert "out of luck on purpose" in failing.stdout.partition("Root Cause")[2]
    assert "RuntimeError" not in failing.stdout  # no traceback of rank 0, which lost its peer


def test_a_second_job_on_a_run_folder_is_refused(digits: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=300"]
    process = begun(tmp_path / "run", 1, *arguments)
    try:
        second = trainer(*arguments, "--run-dir", tmp_path / "run")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert second.returncode == 2
    assert f"is in use by process {process.pid} on " in second.stderr
    assert len(second.stderr.splitlines()) == 1


def test_another_environment_is_reported_once_and_recorded(digits: Path, train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = train("run", "every_steps=3")
    for path in (folder / "checkpoints").glob("step-00000010.pt*"):
        path.unlink()
    state = checkpoint.load(folder / "checkpoints" / "step-00000009.pt")
    state["environments"][0] |= {"torch": "2.0.0", "device": "NVIDIA Imaginary 1"}
    checkpoint.save(folder / "checkpoints", 9, state, keep=2)
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "every_steps=3", "--run-dir", folder]
    drifted = trainer(*arguments, "threads=2")
    assert drifted.returncode == 0, drifted.stderr
    assert drifted.stderr.count("resumes with another ") == 1
    for part in (
        f"torch (2.0.0 before, {torch.__version__} now)",
        "device (NVIDIA Imaginary 1 before, ",
        "threads (1 ",
    ):
        assert part in drifted.stderr
    changed = read_history(folder)[-2]["changed"]
    assert changed["threads"] == ["1", "2"]
    summary = json.loads((folder / "summary.json").read_text())
    assert [environment["threads"] for environment in summary["environments"]] == ["1", "2"]
    assert len(first["environments"]) == 1
    (folder / "summary.json").unlink()
    again = trainer(*arguments, "threads=2")
    assert again.returncode == 0
    assert "resumes with another" not in again.stderr


FULL_DISK = """
mount -t tmpfs -o size=2m tmpfs "$1" || exit 77
shift
"$@" 2>"$OUT/full.log"; echo $? >"$OUT/full.code"
cp -r "$RUN/history.jsonl" "$RUN/metrics.jsonl" "$OUT"
mount -o remount,size=50m "$RUN"
"$@" >"$OUT/again.log" 2>&1; echo $? >"$OUT/again.code"
cp -r "$RUN" "$OUT/run"
"""


def test_a_full_disk_stops_no_run(digits: Path, train: Train, tmp_path: Path) -> None:
    undisturbed = train("undisturbed")
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "every_steps=2", "keep=5", "--run-dir", run]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("unshare is refused here: no small disk can be made")
    subprocess.run(
        [*unshare, "bash", "-c", FULL_DISK, "bash", run, *command(*arguments)],
        cwd=REPOSITORY,
        env={**environment(), "OUT": str(out), "RUN": str(run)},
        check=True,
        timeout=120,
    )
    said = (out / "full.log").read_text()
    assert "could not be written (No space left on device); the one of step 5 is kept" in said
    assert "the checkpoint of step 10 (No space left on device) could not be written; make room" in said
    assert (out / "full.code").read_text() == "1\n"
    assert [row["step"] for row in lines(out) if row["kind"] == "step"] == list(range(1, 11))
    assert "checkpoint_failed" in {row["event"] for row in read_history(out)}
    assert (out / "again.code").read_text() == "0\n", (out / "again.log").read_text()
    assert "resuming after step 5" in (out / "again.log").read_text()
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]
    assert lines(out / "run") == lines(tmp_path / "undisturbed")


def test_the_newest_checkpoint_is_written_before_the_process_leaves(digits: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "every_steps=1", "--run-dir", tmp_path / "run"]
    faulty = trainer(*arguments, module="tests.failing_writer", variables={"FAULT": "slow"})
    assert faulty.returncode == 1
    assert "at step 4 the loss is nan" in faulty.stderr
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 3]
    assert read_history(tmp_path / "run")[-1]["outcome"] == "failed"
    # exit code 75 promises that all is saved
    faulty = trainer(*arguments, module="tests.failing_writer", variables={"FAULT": "unwritable"})
    assert faulty.returncode == 1
    assert "the checkpoint of step 4 could not be written (unexpected pos 64 vs 0); the one of step 3" in faulty.stderr
    assert "Traceback" not in faulty.stderr
    assert read_history(tmp_path / "run")[-1]["outcome"] == "failed"


def test_the_last_evaluation_comes_after_the_last_checkpoint(digits: Path, tmp_path: Path) -> None:
    """Where its details need too much memory the run is done all the same, and says how to make up for them."""
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=1", "--run-dir", tmp_path / "run"]
    done = trainer(*arguments, module="tests.failing_writer", variables={"FAULT": "details"})
    assert done.returncode == 0, done.stderr
    assert (
        f"evaluation.json cannot be written (MemoryError); later: dist-train evaluate {tmp_path / 'run'}" in done.stderr
    )
    assert (tmp_path / "run" / "summary.json").exists()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5]
    # a process that is killed there leaves a run that ends without them
    (tmp_path / "run" / "summary.json").unlink()
    done = trainer(*arguments)
    assert done.returncode == 0, done.stderr
    assert "evaluation.json cannot be written (the run was interrupted before); later: " in done.stderr


def test_a_run_without_a_whole_checkpoint_is_not_started_over(digits: Path, train: Train, tmp_path: Path) -> None:
    train("run", "epochs=1", "keep=1")
    folder = tmp_path / "run"
    (path,) = (folder / "checkpoints").glob("*.pt")
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=1", "keep=1", "--run-dir", folder]
    record, state = (folder / "metrics.jsonl").read_bytes(), checkpoint.load(path)

    def refused() -> str:
        done = trainer(*arguments)
        assert done.returncode == 2, done.stderr
        (sentence,) = done.stderr.splitlines()
        assert (folder / "metrics.jsonl").read_bytes() == record
        return sentence.removeprefix("dist_train: ")

    for content in ({"step": 5, "model": 0}, {**state, "step": 4}, {**state, "optimizers": []}):
        (folder / "summary.json").unlink(missing_ok=True)
        checkpoint.save(path.parent, 5, content, keep=1)  # with a right checksum
        assert refused().startswith(f"{path}")
    path.write_bytes(b"junk")
    for _ in range(2):
        said = refused()
        assert said.startswith(f"checkpoint {path} does not match its checksum, and there is no other to resume from; ")
        assert said.endswith(f"remove the folder {path.parent} to start the run over")


def test_a_run_folder_that_is_moved_or_deleted_ends_the_run_at_once(digits: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "digits", f"data.dir={digits}", *TINY, "epochs=300", "every_steps=2"]
    folder, moved = tmp_path / "run", tmp_path / "moved"
    process = begun(folder, 5, *arguments)
    folder.rename(moved)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"{folder / 'metrics.jsonl'} is not the file that this run writes any more" in said
    assert "Traceback" not in said
    assert not folder.exists()
    steps = checkpoint.steps(moved / "checkpoints")
    process = begun(moved, steps[-1] + 3, *arguments)
    shutil.rmtree(moved, ignore_errors=True)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"resuming after step {steps[-1]}" in said
    assert "any more: it or its folder was moved, replaced or deleted; move it back" in said
    assert "Traceback" not in said
