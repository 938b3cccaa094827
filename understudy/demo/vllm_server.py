"""The real vLLM as a child process, started for the demo and gone with it.

vLLM is two processes, the HTTP server and the engine core, and helpers of theirs. They share one process
group of their own, so that the terminal's Ctrl-C reaches only the demo, and one signal to the group ends them
all. Should the demo itself be killed, nobody is left to send it; so a watchdog process holds the reading end
of a pipe whose writing end only the demo has, and ends the group when the pipe closes. (PR_SET_PDEATHSIG
would reach the server but not its children, and fires when the starting thread ends, not the process.)

No compiler is needed, since nothing is compiled. One system library is: libnuma (Debian's libnuma1).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from understudy.demo.tiny_model import MAX_POSITIONS, Say, TinyModels

READY_WITHIN: Final = 240.0
GRACE: Final = 10.0
TAIL_LINES: Final = 25

WATCHDOG: Final = """
import os, signal, sys, time
group = int(sys.argv[1])
sys.stdin.buffer.read()
for number, pause in ((signal.SIGTERM, 5), (signal.SIGKILL, 0)):
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        break
    time.sleep(pause)
"""


class VllmFailed(RuntimeError):
    """vLLM ended, or did not answer in time; the message carries the end of its log."""


class VllmServer:
    """`with VllmServer(models) as vllm:` serves `base` and adapters at `vllm.url` (no `/v1`)."""

    def __init__(
        self,
        models: TinyModels,
        port: int | None = None,
        log: Path | None = None,
        say: Say = print,
        lora: Sequence[str] = ("careful", "hasty"),
    ) -> None:
        """`lora`: which of the adapters it serves from the start."""
        self.models = models
        self.lora = lora
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or Path(tempfile.gettempdir()) / f"understudy-vllm-{self.port}.log"
        self._say = say
        self._server: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        require_libnuma()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._server = subprocess.Popen(
                command(self.models, self.port, self.lora),
                env=os.environ | environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watchdog = subprocess.Popen(
            [sys.executable, "-IS", "-c", WATCHDOG, str(self._server.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        started = time.monotonic()
        next_word = 10.0
        self._say(f"Starting vLLM on {self.url} (log: {self.log})")
        while not answers(f"{self.url}/health"):
            waited = time.monotonic() - started
            if self._server is None or self._server.poll() is not None:
                raise VllmFailed(f"vLLM ended while starting.\n{self.log_tail()}")
            if waited > READY_WITHIN:
                raise VllmFailed(f"vLLM did not answer within {READY_WITHIN:.0f} s.\n{self.log_tail()}")
            if waited >= next_word:
                self._say(f"  still starting, {waited:.0f} s")
                next_word += 10.0
            time.sleep(0.2)
        self._say(f"vLLM ready after {time.monotonic() - started:.0f} s")

    def stop(self) -> None:
        """End the whole group and wait for it; safe to call twice."""
        if self._server is not None:
            end_group(self._server)
        # Only now: until the group is gone, the watchdog is what ends it should we be killed here.
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()
        self._server = self._watchdog = None

    def log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        return f"(no log at {self.log})"


def command(models: TinyModels, port: int, lora: Sequence[str]) -> list[str]:
    """The flags the demo needs; the module, because the `vllm` script of the CPU build lacks its metadata."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(models.base), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning"),
        # No compilation: it costs more than this model will ever run, and would need a C++ compiler.
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_POSITIONS)),
        # More than are ever used: on a CPU vLLM gives the last one's weights to requests without an adapter.
        *("--enable-lora", "--max-loras", "64", "--max-lora-rank", "16"),
        *(["--lora-modules", *(f"{name}={getattr(models, name)}" for name in lora)] if lora else []),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        # A small model given the choice fills its JSON with blanks.
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        *("--max-num-seqs", "32"),
        # The model's own generation_config adds nothing, and would change the sampling defaults.
        *("--generation-config", "vllm"),
        # A cap on every answer: on text unlike its training, a tiny model may not find its end mark.
        *("--override-generation-config", '{"max_new_tokens": 128}'),
    ]


def environment() -> dict[str, str]:
    return {
        # The engine runs the model itself: one process fewer to start (9 s), and twice the requests a second.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Bound threads stall beside the gateway and the learner on a small machine; binding memory needs a
        # privilege containers lack.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """Ask politely, then insist. The leader may die before its children, so the whole group is waited for."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, number)
        deadline = time.monotonic() + GRACE
        while leader.poll() is None or alive(leader.pid):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return


def alive(group: int) -> bool:
    """Whether any process of the group still runs. A zombie does not: in a container nobody may reap it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def require_libnuma() -> None:
    """Said here, because vLLM would pass over its kernels' failed import and stumble later."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise VllmFailed("vLLM on CPU needs libnuma: apt-get install libnuma1") from error


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
