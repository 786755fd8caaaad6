"""Virtual hosts for tests of lost machines: Linux namespaces, each with its own name, address, processes and cable.

A host has its own network, UTS, PID, IPC and mount namespaces and shares the file system with the other hosts, like
the machines of a cluster. One more network namespace is the switch: a bridge with one port for each host and no
connection to the machine's network, so that concurrent test runs do not interfere. Needs root, or permission to create
user namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

_USER = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
_SWITCH = ["unshare", *_USER, "--net", "--fork", "--kill-child"]
# when the first process of a PID namespace ends, the kernel kills all others in it
_HOST = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]


class Hosts:
    """Hosts 0, 1, ... of one network. Made by `hosts`.

    names: their host names, each of which every host can resolve.
    """

    def __init__(self, count: int, etc_hosts: Path, ends: ExitStack) -> None:
        self._ends = ends
        self._started: list[subprocess.Popen[bytes]] = []
        ends.callback(self._wait)  # called last, after the hosts have ended
        self.names = [f"node{index}" for index in range(count)]
        addresses = [f"10.77.0.{index + 1}" for index in range(count)]
        entries = ["127.0.0.1 localhost", *map(" ".join, zip(addresses, self.names, strict=True))]
        etc_hosts.write_text("\n".join(entries) + "\n")
        self._switch = self._hold(_SWITCH)
        self._at_switch("ip", "link", "add", "bridge0", "up", "type", "bridge")
        self._hosts = []
        for index, (name, address) in enumerate(zip(self.names, addresses, strict=True)):
            host = self._hold([*self._enter(self._switch, "--net"), *_HOST])
            self._hosts.append(host)
            port = ["ip", "link", "add", _port(index), "up", "master", "bridge0", "type", "veth"]
            self._at_switch(*port, "peer", "name", "eth0", "netns", str(host.pid))
            script = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && '
            script += 'ip address add "$3/24" dev eth0 && ip link set eth0 up'
            set_up = ["sh", "-c", script, "sh", name, str(etc_hosts), address]
            subprocess.run([*self._enter_host(index), *set_up], check=True)

    def start(
        self, host: int, command: list[str], *, cwd: Path, env: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, with its output in the file `log`. It is killed when the host ends."""
        entered = [*self._enter_host(host), "env", f"--chdir={cwd}", *command]  # a mount namespace resets it
        with log.open("ab") as file:
            process = subprocess.Popen(entered, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self._started.append(process)
        return process

    def power_off(self, host: int) -> None:
        """Kill all processes of a host at once; it cannot be started again."""
        self._hosts[host].kill()
        self._hosts[host].wait()

    def unplug(self, host: int) -> None:
        """Pull a host's cable: its processes continue, without a connection to other hosts."""
        self._at_switch("ip", "link", "set", _port(host), "down")

    def plug(self, host: int) -> None:
        """Reconnect a host's cable."""
        self._at_switch("ip", "link", "set", _port(host), "up")

    def _wait(self) -> None:
        for process in self._started:
            process.wait()

    def _hold(self, unshare: list[str]) -> subprocess.Popen[bytes]:
        """A process that keeps new namespaces alive until the end of the context, or until this process dies."""
        command = [*unshare, "sh", "-c", "echo up && exec cat"]  # cat ends when this process closes the pipe
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        self._ends.enter_context(process)  # closes the pipes and waits
        self._ends.callback(process.kill)
        if process.stdout.readline() != b"up\n":
            raise OSError(f"{' '.join(command)} failed with exit code {process.wait()}")
        return process

    def _enter(self, process: subprocess.Popen[bytes], *namespaces: str) -> list[str]:
        user = ["--user", "--preserve-credentials"] if _USER else []
        return ["nsenter", f"--target={process.pid}", *user, *namespaces]

    def _enter_host(self, host: int) -> list[str]:
        process = self._hosts[host]
        inner = f"--pid=/proc/{process.pid}/ns/pid_for_children"  # unshare itself stays outside
        return self._enter(process, "--net", "--uts", "--ipc", "--mount", inner)

    def _at_switch(self, *command: str) -> None:
        subprocess.run([*self._enter(self._switch, "--net"), *command], check=True)


def _port(host: int) -> str:
    return f"port{host}"


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Hosts for the duration of the context; their processes are killed at its end. Skips the test where namespaces are
    refused, or `ip` is missing."""
    if shutil.which("ip") is None:
        pytest.skip("no command ip here: install the package iproute2")
    refused = subprocess.run([*_SWITCH, *_HOST, "true"], capture_output=True, text=True)
    if refused.returncode != 0:
        pytest.skip(f"namespaces are refused here ({refused.stderr.strip()}): run as root")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        yield Hosts(count, Path(folder) / "hosts", ends)
