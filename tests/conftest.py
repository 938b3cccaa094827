"""A whole gateway for tests: the real ASGI application in uvicorn on a port of its own, and its controller."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import yaml
from fake_vllm import FakeVllm
from prometheus_client.parser import text_string_to_metric_families
from real_vllm import RealVllm

from gateway.auth import new_key
from router.arms import Snapshot, Sums
from router.store import Store
from router.store_sqlite import SqliteStore
from telemetry.errors import StateLocked
from telemetry.events import Interaction, Shadow, Signal
from telemetry.journal import Journal
from understudy.compose import build_controller, build_spans, open_store
from understudy.demo.vllm_server import VllmServer
from understudy.serve import server
from understudy.settings import load

BOOT = pytest.StashKey[RealVllm]()
Found = TypeVar("Found")
ROUTE = "assistant"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs vLLM comes last."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    needed = any(item.get_closest_marker("vllm") for item in session.items)
    if needed and RealVllm.installed() and not session.config.option.collectonly:
        session.config.stash[BOOT] = RealVllm()
        session.config.stash[BOOT].start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if BOOT in session.config.stash:
        session.config.stash[BOOT].stop()


@pytest.fixture(scope="session")
def vllm(request: pytest.FixtureRequest) -> VllmServer:
    """The real vLLM, which serves `base`, `careful` and `hasty`."""
    if BOOT in request.config.stash:
        return request.config.stash[BOOT].ready()
    if os.environ.get("CI") == "true":
        pytest.fail("vLLM is not installed: scripts/setup demo")
    pytest.skip("vLLM is not installed: scripts/setup demo")


def eventually(predicate: Callable[[], Found], timeout: float = 5.0, every: float = 0.01) -> Found:
    """What the predicate returned when first true."""
    deadline = time.monotonic() + timeout
    while not (found := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s; last: {found!r}")
        time.sleep(every)
    return found


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        asyncio.run(test(*args, **fixtures))

    return run


def ask(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": ROUTE, "messages": [{"role": "user", "content": text}], **fields}


class Gateway:
    """A gateway that runs. Its journal and store are opened anew on each look, as another process would."""

    def __init__(self, config: Path, http: str | None = None) -> None:
        """`http`: uvicorn's own implementation, in the place of ours."""
        self.settings = load(config)
        self.port = 0
        self.controller_failed: BaseException | None = None
        self._tell: Callable[[], object] = lambda: None
        self._stopping, self._controlled = threading.Event(), threading.Event()
        self._clients = contextlib.ExitStack()
        self._listening = socket.socket()
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listening.bind(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._server = server(self.settings)
        if http is not None:
            self._server.config.http = http  # type: ignore[assignment]
        self._server.main_loop = self._until_told  # type: ignore[method-assign]
        self._threads = [
            threading.Thread(target=self._server.run, args=([self._listening],), name="gateway", daemon=True),
            threading.Thread(target=self._control, name="controller", daemon=True),
        ]
        self.http = self._clients.enter_context(httpx.Client(base_url=self.url, timeout=20))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Gateway:
        for thread in self._threads:
            thread.start()
        eventually(lambda: self._server.started or not self._threads[0].is_alive(), 20)
        assert self._server.started, "the gateway did not start"
        assert self._controlled.wait(20), "the controller did not start"
        return self

    def stop(self) -> None:
        """Stop both; raises what the controller died of, if it did."""
        if self._stopping.is_set():
            return
        self._clients.close()
        self._stopping.set()
        self._server.should_exit = True
        self._tell()
        for thread in self._threads:
            thread.join(20)
        self._listening.close()
        assert not any(thread.is_alive() for thread in self._threads), "the gateway did not stop"
        if self.controller_failed is not None:
            raise self.controller_failed

    async def _until_told(self) -> None:
        """In the place of uvicorn's loop, which looks ten times a second whether it shall end: hundreds would wait."""
        told = asyncio.Event()
        self._tell = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, told.set)
        await told.wait()

    def _control(self) -> None:
        spans = build_spans(self.settings)
        controller = build_controller(self.settings, "test", spans.heard if spans else None)
        self._controlled.set()
        try:
            while not self._stopping.is_set():
                with contextlib.suppress(StateLocked):  # by a test; `Controller.run` outlives it too
                    if controller.step(time.time()):
                        continue
                self._stopping.wait(0.05)
        except BaseException as error:
            self.controller_failed = error
        finally:
            if spans:
                spans.close()

    def client(self, key: str = "none", **headers: str) -> openai.OpenAI:
        """The real OpenAI client; it never retries by itself."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, default_headers=headers)
        self._clients.callback(client.close)
        return client

    def chat(self, text: str = "hello", headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """One chat completion as plain HTTP."""
        return self.http.post("/v1/chat/completions", json=ask(text, **fields), headers=headers)

    def feedback(self, body: object, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post("/v1/feedback", content=json.dumps(body), headers=named)

    def key(self, tenant: str, role: str = "app") -> str:
        """A new API key, already known to the gateway."""
        secret, kept = new_key(tenant, role, time.time())
        with self.store() as store:
            store.put_key(kept)
        bearer = {"authorization": f"Bearer {secret}"}
        session = {"session_id": "nobody", "kind": "comment"}
        # Without a key this is taken too, but for another tenant: look at what was journaled.
        eventually(lambda: self._tenant_of(self.feedback(session, **bearer)) == tenant)
        return secret

    def _tenant_of(self, said: httpx.Response) -> str | None:
        ids = said.json().get("ids", [])
        return next((s.tenant for s in self.signals() if s.event_id in ids), None)

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        journal = Journal(self.settings.journal_path)
        try:
            yield journal
        finally:
            journal.close()

    @contextlib.contextmanager
    def store(self) -> Iterator[Store]:
        store = open_store(self.settings)
        try:
            yield store
        finally:
            store.close()

    def interactions(self) -> list[Interaction]:
        with self.journal() as journal:
            return [fact for _, fact in journal.read(0, 100_000) if isinstance(fact, Interaction)]

    def signals(self, kind: str | None = None) -> list[Signal]:
        with self.journal() as journal:
            facts = [fact for _, fact in journal.read(0, 100_000)]
        return [f for f in facts if isinstance(f, Signal) and kind in (None, f.kind)]

    def shadows(self) -> list[Shadow]:
        """What challengers answered to copies."""
        with self.journal() as journal:
            return [fact for _, fact in journal.read(0, 100_000) if isinstance(fact, Shadow)]

    def wait_shadows(self, n: int = 1) -> list[Shadow]:
        return eventually(lambda: found if len(found := self.shadows()) >= n else [])

    def wait_interactions(self, n: int = 1) -> list[Interaction]:
        """The journal's interactions once there are `n` of them."""
        return eventually(lambda: found if len(found := self.interactions()) >= n else [])

    def interaction(self, n: int = 1) -> Interaction:
        """The `n`-th (from 1) interaction, once it is journaled."""
        return self.wait_interactions(n)[n - 1]

    def settled(self) -> None:
        """Return when the controller has taken in all that is journaled now."""
        with self.journal() as journal:
            last = journal.last()

        def reached() -> bool:
            assert self.controller_failed is None, self.controller_failed
            with self.store() as store:
                return store.marked("journal") >= last

        eventually(reached)

    def sums(self) -> dict[str, Sums]:
        """Each arm's sums, once all that is journaled is in them."""
        self.settled()
        totals: dict[str, Sums] = {}
        with self.store() as store:
            for cell, sums in store.sums(ROUTE).items():
                totals[cell.arm] = totals.get(cell.arm, Sums()).plus(sums)
        return totals


MakeGateway = Callable[..., Gateway]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[MakeGateway]:
    """Makes gateways: `gateway(fake)` or `gateway("http://…", arms={…}, policy={…}, timeouts={…}, auth={…})`."""
    made: list[Gateway] = []

    def make(*upstreams: FakeVllm | str, **options: Any) -> Gateway:
        route = {
            "upstreams": [u if isinstance(u, str) else u.url for u in upstreams],
            "arms": options.pop("arms", {"champion": {"model": "base"}}),
            "timeouts": {"connect": "1s", "first_byte": "5s", "idle": "5s"} | options.pop("timeouts", {}),
            "policy": {"kind": "thompson", "refresh": "50ms"} | options.pop("policy", {}),
        }
        route |= options.pop("route", {})
        if "reward" in options:
            route["reward"] = options.pop("reward")
        options["auth"] = {"feedback_per_minute": 1e6} | options.get("auth", {})
        http = options.pop("http", None)
        config = tmp_path / f"understudy-{len(made)}.yaml"
        state = options.pop("state", f"sqlite:////{str(tmp_path).lstrip('/')}/state-{len(made)}.db")
        config.write_text(yaml.safe_dump({"state": state, "routes": {ROUTE: route}} | options, sort_keys=False))
        made.append(Gateway(config, http).start())
        return made[-1]

    yield make
    with contextlib.ExitStack() as stack:
        for one in made:
            stack.callback(one.stop)


class Publisher:
    """Publishes snapshots in the place of the controller, whose lease it holds."""

    def __init__(self, state: Path) -> None:
        self.state = f"sqlite:////{str(state).lstrip('/')}"
        self.store = SqliteStore(state)
        lease = self.store.lease("publisher", 3600.0, time.time())
        assert lease is not None
        self._token, self._version = lease.token, 0

    def publish(self, weights: dict[str, float], **fields: Any) -> Snapshot:
        self._version += 1
        given = {"lead": "champion", "holdout": 0.0} | fields
        snapshot = Snapshot(ROUTE, self._version, time.time(), "thompson", segments={"": weights}, **given)
        self.store.publish(snapshot, self._token)
        return snapshot

    def show(self, gw: Gateway, weights: dict[str, float], **fields: Any) -> Snapshot:
        """Publish, and return when the gateway draws from it."""
        snapshot = self.publish(weights, **fields)
        eventually(lambda: metric(gw, "understudy_snapshot_version", route=ROUTE) == snapshot.version)
        return snapshot


def metric(gw: Gateway, name: str, **labels: str) -> float:
    """The sum of a metric's lines that have these labels."""
    families = text_string_to_metric_families(gw.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    """For a gateway made with `state=publisher.state`."""
    made = Publisher(tmp_path / "published.db")
    yield made
    made.store.close()


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm(["base", "good", "bad"]) as server:
        yield server


@pytest.fixture
def other_fake() -> Iterator[FakeVllm]:
    with FakeVllm(["base", "good", "bad"]) as server:
        yield server
