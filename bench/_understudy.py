"""Understudy in the variants that are measured: as it is used, with more of something, with another state."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _fill import fill_journal
from _processes import NotInstalled, free_port, holders, pin, spawn, tree, wait_for, wait_until_ready

from router.store import Store
from router.store_redis import RedisStore
from router.store_sqlite import SqliteStore
from telemetry.errors import StateError
from telemetry.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
ROUTE = "assistant"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run it. The plain one: one worker, one route, two arms, SQLite, no collector."""

    name: str = "understudy"
    workers: int = 1
    arms: int = 2
    routes: int = 1
    state: str = ""
    """URL of a Redis; "" for a SQLite file of its own."""
    collector: str = ""
    rows: int = 0
    """Facts that the journal holds already, each of a session of its own."""
    admin: bool = True
    """With its admin listener: a process that costs nothing until it is asked, but time to start."""

    def config(self, port: int, upstream: int, database: Path) -> str:
        names = [ROUTE] if self.routes == 1 else [f"{ROUTE}-{n}" for n in range(self.routes)]
        models = ["good", "better", *(f"model-{n}" for n in range(2, self.arms))]
        arms = ", ".join(f"arm{n}: {{model: {model}}}" for n, model in enumerate(models))
        lines = [
            f"listen: {{port: {port}, workers: {self.workers}}}",
            f"admin: {'{port: 0}' if self.admin else 'null'}",
            f"state: {self.state or f'sqlite:///{database}'}",
            f"journal: {database}",
            *([f"otel: {{endpoint: '{self.collector}'}}"] if self.collector else []),
            "routes:",
        ]
        for name in names:
            lines += [
                f"  {name}:",
                f"    upstreams: [http://127.0.0.1:{upstream}]",
                f"    arms: {{{arms}}}",
                f"    policy: {{kind: thompson, floor: {min(0.02, 0.5 / self.arms)}}}",
            ]
        return "\n".join(lines) + "\n"


@dataclass(slots=True)
class Started:
    """An Understudy that was spawned."""

    process: subprocess.Popen[Any]
    port: int
    variant: Variant
    database: Path

    @property
    def workers(self) -> list[int]:
        """The processes that carry requests: those below the supervisor that hold its socket."""
        return holders(self.port, [pid for pid in tree(self.process.pid) if pid != self.process.pid])

    def settler(self) -> Callable[[], None]:
        """What waits until the controller has taken in all that was journaled: requests gave it that work."""
        journal = Journal(self.database)
        store: Store = RedisStore(self.variant.state) if self.variant.state else SqliteStore(self.database)

        def settle() -> None:
            deadline, still, last = time.monotonic() + 120, 0, -1
            while time.monotonic() < deadline and still < 3:
                try:
                    written, read = journal.last(), store.marked("journal")
                except StateError:
                    written, read = -1, -2
                still = still + 1 if written == read == last else 0
                last = written
                time.sleep(0.03)

        return settle


def begin(variant: Variant, upstream: int, folder: Path, core: int | None = 0) -> Started:
    """Spawn it before the upstream; it is not ready yet."""
    home = folder / variant.name.replace(" ", "-")
    home.mkdir(exist_ok=True)
    port, database = free_port(), home / "understudy.db"
    if variant.rows:
        past = folder / f"journal-{variant.rows}.db"
        if not past.exists():
            fill_journal(past, variant.rows)
        shutil.copy(past, database)
    config = home / "understudy.yaml"
    config.write_text(variant.config(port, upstream, database))
    command = [sys.executable, "-m", "understudy", "serve", "--config", str(config)]
    return Started(spawn(command, home, "understudy", {"PYTHONPATH": str(ROOT)}, core), port, variant, database)


def finish(started: Started, step: float = 0.05) -> None:
    """Wait until it is ready. Raises `NotInstalled` with the end of its log."""
    ready = f"http://127.0.0.1:{started.port}/readyz"
    wait_until_ready(started.process, started.database.parent, "understudy", ready, 120, step)


def version() -> str:
    try:
        found = importlib.metadata.version("understudy")
    except importlib.metadata.PackageNotFoundError:
        found = "of a source tree"
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return f"{found} ({said})" if said else found


def redis_program() -> str:
    """Raises `NotInstalled`."""
    beside = Path(sys.executable).parent / "redis-server"
    found = os.environ.get("REDIS_SERVER") or (str(beside) if beside.exists() else shutil.which("redis-server"))
    if not found or not Path(found).exists():
        raise NotInstalled("no `redis-server`: run scripts/setup redis")
    return found


def start_redis(folder: Path) -> tuple[str, subprocess.Popen[Any]]:
    """Its URL, and the process, on core 1: another machine's, so to speak. Raises `NotInstalled`."""
    port = free_port()
    command = [redis_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=pin(1)
    )
    wait_for(port, "redis-server")
    return f"redis://127.0.0.1:{port}/0", process
