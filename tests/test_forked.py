"""A command in a forked process (forked.py) finds what it finds in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import environment

# prints all that a command can see of its start, on both outputs, and ends in one of several ways
COMMAND = """
import atexit, os, pathlib, signal, sys, tempfile, threading
def shown():
    import torch
    streams = sys.stdin, sys.stdout, sys.stderr
    for value in (
        sys.argv, sys.orig_argv, sys.path, os.getcwd(), sorted(os.environ.items()), sys.stdin.read(),
        __name__, __file__, __spec__.name, os.nice(0), os.sched_getaffinity(0), tempfile.gettempdir(),
        [(stream.isatty(), stream.encoding, stream.errors) for stream in streams],
        [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        signal.pthread_sigmask(signal.SIG_BLOCK, ()), threading.active_count(), threading.current_thread().name,
        torch.get_num_threads(), torch.get_num_interop_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), torch.is_grad_enabled(),
        [name for name in sys.modules if name.partition(".")[0] in ("dist_train", "conftest", "peers", "pytest")],
    ):
        print(value)
if __name__ == "__main__":
    how = sys.argv[1]
    if how == "0":
        shown()
    threading.Thread(target=lambda: (threading.Event().wait(0.2), print("a thread has ended"))).start()
    atexit.register(print, "the end")
    print("an error", file=sys.stderr)
    if how == "raise":
        raise ValueError("out of luck on purpose")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "leave":
        sys.stdout.flush()
        os._exit(75)
    sys.exit(int(how) if how.isdigit() else how or None)
"""


@pytest.mark.parametrize("how", ["", "0", "2", "a sentence", "raise", "leave", "kill"])
def test_a_forked_command_is_like_one_of_its_own(tmp_path: Path, how: str) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(COMMAND)
    words = [sys.executable, "-m", "package", how, "ä b"]
    more = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(tmp_path / "elsewhere"), "OF_A_TEST": "1"}
    env = {**environment(), **more}
    own = subprocess.run(words, cwd=tmp_path, env=env, input="given", capture_output=True, text=True, check=False)
    found = forked.run(words, tmp_path, env, stdin=b"given")
    assert found.returncode == own.returncode
    assert found.stdout.splitlines() == own.stdout.splitlines()
    if how == "raise":
        assert own.stderr.endswith("\nValueError: out of luck on purpose\n")
        assert found.stderr.splitlines()[0] == own.stderr.splitlines()[0] == "an error"
        assert found.stderr.splitlines()[-3:] == own.stderr.splitlines()[-3:]
    else:
        assert found.stderr == own.stderr


def test_each_draws_numbers_of_its_own(tmp_path: Path) -> None:
    """Else a result that depends on an unseeded generator would look like the same bits."""
    drawn = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item(), sep='\\n')"
    (tmp_path / "drawing.py").write_text(drawn)
    runs = [forked.run([sys.executable, "-m", "drawing"], tmp_path, environment()).stdout.split() for _ in range(2)]
    assert [len(run) for run in runs] == [3, 3]
    assert not {*runs[0]} & {*runs[1]}


def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    (tmp_path / "sleeping.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(100)")
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        forked.run([sys.executable, "-m", "sleeping"], tmp_path, environment(), timeout=1)
    assert not Path(f"/proc/{int(str(ended.value.output))}").exists()


def test_ranks_have_the_variables_of_a_launcher(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("import os, sys; print(os.environ['RANK']); sys.exit(os.environ['RANK'] == '1')")
    done = forked.run([sys.executable, "-m", "rank"], tmp_path, environment(), ranks=3)
    assert (done.returncode, done.stdout) == (1, "0\n1\n2\n")
    assert "RANK" not in os.environ
