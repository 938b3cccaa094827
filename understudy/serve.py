"""`understudy serve`: one supervisor, N workers that share a port, one controller, and what operators look at.

The supervisor binds the port and starts the others; whoever dies is started again, a little later each time it
dies young. SIGTERM or SIGINT lets workers finish what they are answering (at most `DRAIN` seconds), then the rest.
If the supervisor itself is killed, its children notice and leave.
"""

from __future__ import annotations

import gc
import ipaddress
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn

from gateway.http import protocol
from telemetry.errors import StateError, StateUnavailable
from telemetry.retention import keep_to
from understudy.compose import Alerts, build_admin, build_controller, build_gateway, build_spans, open_store
from understudy.settings import Settings, load

log = logging.getLogger("understudy")

DRAIN = 30.0
_spawn = multiprocessing.get_context("spawn")


def serve(config: Path) -> int:
    """Serve until told to stop. Returns the exit code. Raises `ConfigError` and `StateError` before it starts."""
    settings = load(config)
    _configure_logging()
    _check_state(settings)
    listening = _bind(settings.listen.host, settings.listen.port, "listen.port")
    metrics = tempfile.mkdtemp(prefix="understudy-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
    stopping = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.set())
    crew = [_Member(f"worker {n + 1}", _worker, (str(config), listening)) for n in range(settings.listen.workers)]
    crew.append(_Member("controller", _controller, (str(config),)))
    looking = bind_admin(settings)
    if looking is not None:
        crew.append(_Member("admin", _admin, (str(config), looking)))
    try:
        for member in crew:
            member.start()
        log.info("serving http://%s/v1 with %d worker(s)", _address(listening), settings.listen.workers)
        if looking is not None:
            log.info("rollouts are shown at http://%s/ui/rollout", _address(looking))
        while not stopping.wait(0.2):
            for member in crew:
                member.look_after()
    finally:
        for member in crew:
            member.tell_to_stop()
        deadline = time.monotonic() + DRAIN + 5
        for member in crew:
            member.wait(deadline)
        for bound in (listening, looking):
            if bound is not None:
                bound.close()
        shutil.rmtree(metrics, ignore_errors=True)
    return 0


class _Member:
    """A process that is kept alive."""

    def __init__(self, name: str, target: object, args: tuple[object, ...]) -> None:
        self._name = name
        self._target = target
        self._args = args
        self._process: BaseProcess | None = None
        self._began = 0.0
        self._again_at = 0.0
        self._deaths = 0

    def start(self) -> None:
        process = _spawn.Process(target=self._target, args=(os.getpid(), *self._args), name=self._name)  # type: ignore[arg-type]
        process.start()
        self._process, self._began = process, time.monotonic()

    def look_after(self) -> None:
        """Start the process again if it died: at once at first, up to 8 s later if it keeps dying young."""
        now = time.monotonic()
        if self._process is not None and self._process.exitcode is not None:
            self._deaths = self._deaths + 1 if now - self._began < 10 else 0
            self._again_at = now + (min(8.0, 0.25 * 2**self._deaths) if self._deaths else 0.0)
            log.warning("%s ended with %s; starting it again", self._name, self._process.exitcode)
            _forget_metrics_of(self._process.pid)
            self._process = None
        if self._process is None and now >= self._again_at:
            self.start()

    def tell_to_stop(self) -> None:
        if self._process is not None and self._process.exitcode is None:
            self._process.terminate()

    def wait(self, deadline: float) -> None:
        if self._process is not None:
            self._process.join(max(0.0, deadline - time.monotonic()))
            if self._process.exitcode is None:
                log.warning("%s did not stop in time and is killed", self._name)
                self._process.kill()
                self._process.join()


def _worker(parent: int, config: str, listening: socket.socket) -> None:
    _configure_logging()
    settings = load(config)
    _leave_with(parent)
    serving = server(settings)
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # of what a request leaves, next to nothing needs to be looked for
    serving.run(sockets=[listening])


def server(settings: Settings) -> uvicorn.Server:
    """One worker's HTTP server, not started."""
    return _server(
        build_gateway(settings),
        loop="uvloop",
        http=protocol(settings.listen.max_header_bytes),
        date_header=False,
        timeout_graceful_shutdown=int(DRAIN),
        timeout_keep_alive=75,
        backlog=4096,
    )


def _server(app: Any, **more: Any) -> uvicorn.Server:
    """An ASGI application's, with what both listeners have in common."""
    quiet: dict[str, Any] = {"access_log": False, "log_config": None, "log_level": "warning"}
    plain: dict[str, Any] = {"lifespan": "on", "ws": "none", "proxy_headers": False, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, **(quiet | plain | more)))


def _controller(parent: int, config: str) -> None:
    from gateway.metrics import Metrics  # no other process that this file starts has any of its own

    _configure_logging()
    settings = load(config)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_with(parent)
    owner = f"{socket.gethostname()}:{os.getpid()}"
    aging = (settings.journal_path, settings.capture.retention, stopping)
    threading.Thread(target=keep_to, args=aging, name="retention", daemon=True).start()
    metrics = Metrics()
    spans, alerts = build_spans(settings, metrics.spans_dropped.inc), Alerts(settings)
    controller = build_controller(settings, owner, spans.heard if spans else None, alerts.tell)
    gc.freeze()  # what is there by now stays: collections need not look through it again and again
    controller.run(stopping)
    alerts.close()
    if spans:
        spans.close()


def _leave_with(parent: int) -> None:
    """End this process, properly, when the supervisor is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _admin(parent: int, config: str, listening: socket.socket) -> None:
    """A process of its own: one that shows why another died must outlive it, and never takes time from it."""
    _configure_logging()
    settings = load(config)
    _leave_with(parent)
    admin_server(settings).run(sockets=[listening])


def admin_server(settings: Settings) -> uvicorn.Server:
    """The admin listener's HTTP server, not started."""
    return _server(build_admin(settings), loop="asyncio", http=protocol(16 << 10), timeout_graceful_shutdown=2)


def bind_admin(settings: Settings) -> socket.socket | None:
    """None where there is to be no admin listener, or its port is taken: apps are served all the same."""
    if settings.admin is None:
        return None
    try:
        bound = _bind(settings.admin.host, settings.admin.port, "admin.port")
    except StateError as error:
        log.warning("%s, then start again; until then there is no /ui/rollout", error)
        return None
    if not _is_private(bound):
        log.warning("admin.host %s: whoever reaches it sees all rollouts, without a key", settings.admin.host)
    return bound


def _is_private(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(host: str, port: int, key: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise StateError(
            f"cannot listen on {host}:{port}: {error.strerror}; change `{key}`, or stop what uses it"
        ) from None
    listening.listen(4096)
    listening.set_inheritable(True)
    return listening


def _check_state(settings: Settings) -> None:
    """Open the journal and the store once, so that what is wrong with them is said here and not N times."""
    from telemetry.journal import Journal

    journal = Journal(settings.journal_path)
    store = open_store(settings)
    try:
        store.ping()
    except StateUnavailable as error:
        if journal.known("gateway") is None:
            raise
        log.warning("%s; starting with the keys and weights known last", error)
    finally:
        store.close()
        journal.close()


def _forget_metrics_of(pid: int | None) -> None:
    from prometheus_client.multiprocess import mark_process_dead

    if pid is not None:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _configure_logging() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", level=logging.INFO)
    logging.captureWarnings(True)
