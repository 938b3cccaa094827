"""A real Redis of the tests' own: a free port, nothing on disk, gone with the process that started it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest


def binary() -> str:
    """The server to run; without one the test skips, or fails where CI=true."""
    beside = Path(sys.executable).parent / "redis-server"
    found = os.environ.get("REDIS_SERVER") or (str(beside) if beside.exists() else shutil.which("redis-server"))
    if found:
        return found
    message = "no redis-server: run scripts/setup redis"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class RedisServer:
    """`with RedisServer() as redis: redis.url`; `stop` and `start` keep the port, and the data only if `durable`."""

    def __init__(self, durable: bool = False) -> None:
        self._durable = durable
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = tempfile.mkdtemp(prefix="understudy-redis-")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        log = ("yes", "--appendfsync", "always") if self._durable else ("no",)
        command = [binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", *log]
        self._process = subprocess.Popen(
            command, cwd=self._folder, stdout=subprocess.DEVNULL, preexec_fn=_die_with_parent
        )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
