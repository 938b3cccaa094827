"""The tests' one real vLLM: it takes a minute to come up, beside the tests that do not need it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from understudy.demo import tiny_model
from understudy.demo.vllm_server import VllmServer

CACHE = Path(".cache/demo")
BUILD = (
    "import sys; from pathlib import Path; from understudy.demo import tiny_model; tiny_model.build(Path(sys.argv[1]))"
)


class RealVllm:
    """Comes up beside the tests from `start` on; `ready` waits for it. Gone with `stop`, or with this process."""

    def __init__(self) -> None:
        self._server: VllmServer | None = None
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._come_up, name="vllm", daemon=True)

    @staticmethod
    def installed() -> bool:
        return find_spec("vllm") is not None

    def start(self) -> None:
        self._thread.start()

    def _come_up(self) -> None:
        try:
            # In a process of its own: torch would be in the way of all other tests.
            subprocess.run([sys.executable, "-c", BUILD, str(CACHE)], check=True, capture_output=True, text=True)
            self._server = VllmServer(tiny_model.build(CACHE, lambda _: None), say=lambda _: None)
            self._server.start()
        except BaseException as error:
            self._failed = error

    def ready(self) -> VllmServer:
        """Raises what went wrong, if it did."""
        self._thread.join()
        if isinstance(self._failed, subprocess.CalledProcessError):
            raise RuntimeError(f"the tiny models could not be made:\n{self._failed.stderr}") from self._failed
        if self._failed is not None or self._server is None:
            raise RuntimeError("vLLM did not start") from self._failed
        self._server.wait_until_ready()
        return self._server

    def stop(self) -> None:
        self._thread.join()
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                self._server.stop()
