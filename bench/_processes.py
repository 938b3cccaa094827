"""Processes that are measured: where they run, what they have cost so far, how they are started and stopped."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NotInstalled(Exception):
    """Something that cannot be measured here, and why."""


def pin(core: int) -> Callable[[], None]:
    """For a child: run on `core` only (where there is more than one), with as many open files as are allowed."""
    cores = sorted(os.sched_getaffinity(0))
    mine = {cores[min(core, len(cores) - 1)]}
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def settle() -> None:
        os.sched_setaffinity(0, mine)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    return settle


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tree(pid: int) -> list[int]:
    """`pid` and all processes below it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, its own threads only. 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Resident KB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def holders(port: int, pids: list[int]) -> list[int]:
    """Which of `pids` hold the socket that listens on `port`."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if any(_link(file) in sockets for file in Path(f"/proc/{pid}/fd").iterdir()):
                found.append(pid)
    return found


def _link(file: Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process we started and all below it, by their ids."""
    below = tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    for pid in [pid for pid in below if pid != process.pid] + [process.pid] * (process.poll() is None):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def spawn(
    command: list[str], folder: Path, name: str, env: dict[str, str] | None = None, core: int | None = 0
) -> subprocess.Popen[Any]:
    """Start a gateway on `core` (None: on any), its output in a file beside it. Raises `NotInstalled`."""
    with (folder / f"{name}.log").open("wb") as out:
        try:
            return subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                preexec_fn=pin(core) if core is not None else None,
                env={k: v for k, v in os.environ.items() if not k.startswith("OTEL_")} | (env or {}),
            )
        except OSError as error:
            raise NotInstalled(f"{command[0]}: {error.strerror}") from None


def wait_until_ready(
    process: subprocess.Popen[Any], folder: Path, name: str, ready: str, seconds: float, step: float = 0.1
) -> None:
    """Ask `ready` every `step` seconds until it answers 200. Raises `NotInstalled` with the end of its log."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(ready, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(step)
    stop(process)
    lines = [line for line in (folder / f"{name}.log").read_text(errors="replace").splitlines() if line.strip()]
    raise NotInstalled(f"did not start: {lines[-1][:200] if lines else 'it said nothing'}")


def launch(
    command: list[str], folder: Path, name: str, ready: str, seconds: float, env: dict[str, str] | None = None
) -> subprocess.Popen[Any]:
    """Start a gateway on core 0 and wait until `ready` answers. Raises `NotInstalled`."""
    process = spawn(command, folder, name, env)
    wait_until_ready(process, folder, name, ready, seconds)
    return process


def wait_for(port: int, what: str) -> None:
    """Until something listens on `port`."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"{what} did not start")
