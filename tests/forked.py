"""Runs `python -m` commands in processes that are forked from a server, which has imported torch and other libraries
already: their import takes longer than most of the commands.

The server has nothing of this project: a command imports that anew, and finds its arguments, folder, environment,
outputs and exit code as in a process of its own. What Python and native libraries read from the environment when they
start, such as OMP_NUM_THREADS, is the server's, and so are the hashes of strings. Commands whose subject is their
start, their signals or such variables, and the ranks of torchrun, are started without it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from multiprocessing import forkserver
from operator import attrgetter
from pathlib import Path
from unittest import mock

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])
_ENVIRONMENT = dict(os.environ)  # a test may change it before the server starts


def start() -> None:
    """Start the server, if it does not run yet. It ends with this process."""
    path = os.pathsep.join([str(Path(__file__).parent), *_ENVIRONMENT.get("PYTHONPATH", "").split(os.pathsep)])
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with mock.patch.dict(os.environ, {**_ENVIRONMENT, **one_thread, "PYTHONPATH": path}, clear=True):
        forkserver.ensure_running()


def run(
    command: list[str], cwd: Path, env: dict[str, str], timeout: float = 300, ranks: int = 1, stdin: bytes = b""
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with capture_output and text. command: begins with sys.executable, "-m" and a module. ranks: on
    which it is run, with the variables of a launcher where they are several; the outputs are then those of all in turn,
    and the exit code is 0 or that of one that failed."""
    start()
    path = _path(env.get("PYTHONPATH", ""))
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        places = [Path(folder, str(rank)) for rank in range(ranks)]
        for place in places:
            place.with_suffix(".in").write_bytes(stdin)
        port = free.getsockname()[1]
        started = [
            SERVER.Process(target=_become, args=(command, cwd, env | _launched(rank, ranks, port), place, path))
            for rank, place in enumerate(places)
        ]
        free.close()
        for process in started:
            process.start()
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        out, error = ("".join(place.with_suffix(kind).read_text() for place in places) for kind in (".out", ".err"))
    if None in codes:
        raise subprocess.TimeoutExpired(command, timeout, out, error)
    return subprocess.CompletedProcess(command, next(filter(None, codes), 0), out, error)


def _launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher adds to the environment of one of several ranks."""
    if ranks == 1:
        return {}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **sizes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@cache
def _path(search: str) -> list[str]:
    """sys.path of a new Python, without the first part, which is the current folder. search: PYTHONPATH."""
    asked = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    answer = subprocess.run(asked, env={**_ENVIRONMENT, "PYTHONPATH": search}, capture_output=True, check=True)
    found: list[str] = json.loads(answer.stdout)
    return found


def _become(command: list[str], cwd: Path, env: dict[str, str], place: Path, path: list[str]) -> None:
    """Run a command in this process, which ends with it. place: of its input and outputs, without the suffix."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, kind in enumerate((".in", ".out", ".err")):
        stream = os.open(place.with_suffix(kind), os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(stream, number)
        os.close(stream)
    threads = len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"the server has {threads} threads; a process that is forked from it could hang")
    # the server has closed its own
    sys.stdin = open(0, encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)  # noqa: SIM115
    for module, seed in (("torch", "default_generator.seed"), ("numpy", "random.seed")):
        attrgetter(seed)(sys.modules[module])()  # as Python does with its own
    sys.path[:] = [str(cwd), *path]
    sys.argv, sys.orig_argv = ["-m", *command[3:]], command
    tempfile.tempdir = None  # of another TMPDIR
    code = 1
    try:
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                file.flush()
    finally:
        os._exit(code)
