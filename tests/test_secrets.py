"""A thousand secrets go through a served gateway that may not keep them; then everything it left is searched."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import redis
from conftest import eventually
from fake_collector import Collector
from fake_vllm import FakeVllm
from redis_server import RedisServer

from router.store_redis import RedisStore
from telemetry.journal import Journal
from understudy.demo.story import gateway
from understudy.demo.vllm_server import free_port

SECRETS = 1000
AT_ONCE = 10
"""Secrets in one conversation."""


def with_luhn(digits: str) -> str:
    doubled = [int(d) * 2 for d in digits[::-2]]
    total = sum(map(int, digits[-2::-2])) + sum(d - 9 * (d > 9) for d in doubled)
    return digits + str(-total % 10)


def with_iban_check(country: str, account: str) -> str:
    number = int("".join(str(int(c, 36)) for c in f"{account}{country}00"))
    return f"{country}{98 - number % 97:02d}{account}"


def digits(chance: random.Random, n: int) -> str:
    return "".join(chance.choices(string.digits, k=n))


KINDS: list[Callable[[random.Random], str]] = [
    lambda c: f"{''.join(c.choices(string.ascii_lowercase, k=9))}.{c.randrange(10**6)}@mail{c.randrange(99)}.example",
    lambda c: f"+49 17{c.randrange(10)} {digits(c, 8)}",
    lambda c: with_luhn(f"4{digits(c, 14)}"),
    lambda c: f"sk-{''.join(c.choices(string.ascii_letters + string.digits, k=32))}",
    lambda c: with_iban_check("DE", digits(c, 18)),
]


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.mark.parametrize("text", ["redacted", "off"])
def test_no_secret_is_found_in_what_is_left(tmp_path: Path, store: RedisServer, text: str) -> None:
    chance = random.Random(text)
    secrets = [KINDS[n % len(KINDS)](chance) for n in range(SECRETS)]
    with FakeVllm(["base"]) as fake, Collector() as collector:
        url = f"http://127.0.0.1:{free_port()}"
        config = tmp_path / "understudy.yaml"
        config.write_text(
            f"listen: {{port: {url.rpartition(':')[2]}, workers: 2}}\n"
            f"state: {store.url}\n"
            f"journal: {tmp_path / 'journal.db'}\n"
            f"capture: {{text: {text!r}}}\n"
            "auth: {feedback_per_minute: 100000}\n"
            f"otel: {{endpoint: {collector.url!r}}}\n"
            "routes:\n"
            "  assistant:\n"
            f"    upstreams: [{fake.url}]\n"
            "    arms: {one: {model: base}, two: {model: base}}\n"
            "    policy: {kind: thompson, refresh: 100ms}\n"
            "    reward: {window: 1s}\n"
        )
        with gateway(config, url, tmp_path / "gateway.log"), httpx.Client(base_url=url, timeout=30) as client:
            for start in range(0, SECRETS, AT_ONCE):
                converse(client, secrets[start : start + AT_ONCE])
            page = client.get("/metrics").text
            settle(tmp_path / "journal.db", store.url)
        told = b"".join(collector.bodies)
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file != config)
    places = {"disk": kept, "redis": dumped(store.url), "otlp": told, "metrics": page.encode()}
    assert len(kept) > 100_000
    assert len(told) > 10_000
    leaks = {name: [s for s in secrets if s.encode() in content] for name, content in places.items()}
    assert {name: (len(found), found[:3]) for name, found in leaks.items() if found} == {}
    with closing(Journal(tmp_path / "journal.db")) as journal:
        assert sum(journal.counts().values()) >= SECRETS / AT_ONCE * 9


def converse(client: httpx.Client, secrets: list[str]) -> None:
    """Secrets in every place where people or apps may put one."""
    system, asked, later, tool, user, session, comment, fixed, traced, wrong = secrets
    headers = {"x-understudy-user": user, "x-understudy-session": session}
    messages = [
        {"role": "system", "content": f"You serve {system}."},
        {"role": "user", "content": [{"type": "text", "text": f"My number is {asked}, is it right?"}]},
    ]
    said = client.post("/v1/chat/completions", json={"model": "assistant", "messages": messages}, headers=headers)
    answer = said.json()
    token = said.headers["x-understudy-feedback-token"]
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": json.dumps({"for": tool})}}
    messages += [
        {"role": "assistant", "content": answer["choices"][0]["message"]["content"], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": f"found {tool}"},
        {"role": "user", "content": f"No, that is wrong: {later}"},
    ]
    body = {"model": "assistant", "messages": messages, "stream": True, "user": user, "metadata": {"user_id": user}}
    client.post("/v1/chat/completions", json=body, headers=headers)
    client.post("/v1/responses", json={"model": "assistant", "input": later}, headers=headers)
    client.post("/v1/completions", json={"model": "assistant", "prompt": later}, headers=headers)
    items = [
        {"kind": "comment", "text": comment, "user": user},
        {"kind": "correction", "text": f"It is {fixed}.", "user": user},
        {"kind": "edit", "text": fixed, "target": {"was": fixed}},
        {"kind": "flag", "target": wrong, "text": wrong},
        {"kind": "survey", "name": f"call {wrong}", "value": 3},
        {"kind": "outcome", "session_id": session, "value": {"name": "resolved", "value": 1}},
        {"kind": wrong, "text": wrong},
        {"kind": "rating", "value": wrong},
    ]
    for item in items:
        about = {} if "session_id" in item else {"response_id": answer["id"]}
        client.post("/v1/feedback", json=about | item)
    client.post("/v1/feedback", json={"kind": "comment", "text": comment, "token": token})
    attributes = {
        "understudy.signal.kind": "comment",
        "understudy.signal.text": traced,
        "gen_ai.response.id": answer["id"],
        "user.id": user,
    }
    pairs = [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()]
    spans = [{"traceId": "0" * 31 + "1", "spanId": random.randbytes(8).hex(), "attributes": pairs}]
    assert client.post("/v1/traces", json={"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).is_success
    for bad in ({"model": wrong, "messages": messages}, {"model": "assistant", "messages": wrong}):
        client.post("/v1/chat/completions", json=bad)
    client.get(f"/v1/feedback/{wrong}")


def settle(path: Path, url: str) -> None:
    """Return when the controller has been through all that is journaled."""
    with closing(RedisStore(url)) as store, closing(Journal(path)) as journal:
        eventually(lambda: store.marked("journal") == journal.last() > SECRETS / AT_ONCE * 9, 20)


def dumped(url: str) -> bytes:
    """All that Redis holds, uncompressed."""
    with redis.Redis.from_url(url) as client:
        client.config_set("rdbcompression", "no")
        keys = list(client.scan_iter(count=1000))
        assert keys
        return b"".join(key + (client.dump(key) or b"") for key in keys)
