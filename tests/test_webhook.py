"""Webhooks: what is told arrives in order, and whoever tells is never held up or harmed by the one who listens."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from planted_rollout import STAGES, config, plant

from telemetry.webhook import Webhook
from understudy.compose import Alerts


class Listener:
    """Takes what is posted, or answers with the statuses that it was given first; holds while `go` is not set."""

    def __init__(self, *statuses: int) -> None:
        self.heard: list[dict[str, Any]] = []
        self.tries: list[tuple[str, str]] = []
        self.go = threading.Event()
        self.go.set()
        left = list(statuses)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.tries.append((self.path, self.headers["content-type"]))
                outer.go.wait(10)
                status = left.pop(0) if left else 204
                if status < 300:
                    outer.heard.append(json.loads(body))
                with contextlib.suppress(OSError):  # whoever asked may not wait any more
                    self.send_response(status)
                    self.send_header("location", "/elsewhere")
                    self.send_header("content-length", "0")
                    self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/s3cret"

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def hook(url: str, **options: Any) -> Iterator[tuple[Webhook, list[str]]]:
    said: list[str] = []
    webhook = Webhook(url, **{"backoff": 0.01, "report": said.append} | options)
    yield webhook, said
    webhook.close(0.2)


def test_what_is_told_arrives_as_json_in_order() -> None:
    with Listener() as listener, hook(listener.url) as (webhook, said):
        for n in range(20):
            webhook.tell({"about": "decision", "number": n})
        eventually(lambda: webhook.posted == 20)
    assert [one["number"] for one in listener.heard] == list(range(20))
    assert set(listener.tries) == {("/hook/s3cret", "application/json")}
    assert said == []


def test_a_listener_that_fails_is_asked_three_times_in_all() -> None:
    with Listener(503, 500) as listener, hook(listener.url) as (webhook, said):
        webhook.tell({"n": 1})
        eventually(lambda: webhook.posted == 1)
    assert (len(listener.tries), listener.heard, said) == (3, [{"n": 1}], [])

    with Listener(503, 503, 503) as listener, hook(listener.url) as (webhook, said):
        webhook.tell({"n": 1})
        webhook.tell({"n": 2})
        eventually(lambda: webhook.posted == 1)
    assert (len(listener.tries), listener.heard, webhook.failed) == (4, [{"n": 2}], 1)
    assert "127.0.0.1" in said[0]
    assert "it answered 503" in said[0]


@pytest.mark.parametrize("status", [400, 404, 410, 302, 307])
def test_what_is_refused_or_sent_elsewhere_is_not_tried_again(status: int) -> None:
    with Listener(status) as listener, hook(listener.url) as (webhook, said):
        webhook.tell({"n": 1})
        eventually(lambda: webhook.failed == 1)
    assert listener.tries == [("/hook/s3cret", "application/json")]
    assert "s3cret" not in said[0]


def test_nobody_listens_and_the_url_stays_secret() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with hook(f"http://127.0.0.1:{unused.getsockname()[1]}/s3cret") as (webhook, said):
            webhook.tell({"n": 1})
            eventually(lambda: webhook.failed == 1)
    assert "refused" in said[0]
    assert "s3cret" not in said[0]


def test_while_the_listener_hangs_nobody_waits_and_the_oldest_are_dropped() -> None:
    with Listener() as listener, hook(listener.url, limit=5) as (webhook, said):
        listener.go.clear()
        webhook.tell({"n": 0})
        eventually(lambda: listener.tries)
        began = time.monotonic()
        for n in range(1, 101):
            webhook.tell({"n": n})
        assert time.monotonic() - began < 0.5
        assert webhook.dropped == 95
        listener.go.set()
        eventually(lambda: webhook.posted == 6)
    assert [one["n"] for one in listener.heard] == [0, 96, 97, 98, 99, 100]
    assert len(said) == 1, "said once, not 95 times"


def test_a_try_ends_when_nothing_comes_for_the_timeout() -> None:
    with Listener() as listener, hook(listener.url, timeout=0.1) as (webhook, said):
        listener.go.clear()
        webhook.tell({"n": 0})
        eventually(lambda: webhook.failed == 1)
        assert len(listener.tries) == 3
    assert "timed out" in said[0]


def test_what_cannot_be_written_is_counted_and_harms_nobody() -> None:
    with Listener() as listener, hook(listener.url) as (webhook, said):
        webhook.tell({"n": object()})
        webhook.tell({"n": 1})
        eventually(lambda: webhook.posted == 1)
    assert (webhook.failed, len(said)) == (1, 1)


def test_the_end_posts_what_waits_but_not_for_ever() -> None:
    with Listener() as listener:
        webhook = Webhook(listener.url)
        for n in range(10):
            webhook.tell({"n": n})
        webhook.close()
        assert len(listener.heard) == 10
        webhook.tell({"n": "late"})
        assert webhook.dropped == 1

    said: list[str] = []
    with Listener() as listener:
        listener.go.clear()
        webhook = Webhook(listener.url, report=said.append)
        for n in range(10):
            webhook.tell({"n": n})
        began = time.monotonic()
        webhook.close(0.2)
        assert time.monotonic() - began < 2.0
    assert webhook.dropped >= 9
    assert "were not posted before the end" in said[-1]


def test_one_that_was_told_nothing_has_no_thread() -> None:
    before = threading.active_count()
    webhook = Webhook("http://127.0.0.1:9/")
    assert threading.active_count() == before
    webhook.close()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/", "127.0.0.1:80", "http:///x"])
def test_only_web_urls_are_taken(url: str) -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        Webhook(url)


def test_a_rollouts_decisions_and_tripped_guardrails_are_told(tmp_path: Path) -> None:
    with Listener() as listener:
        settings = config(tmp_path, rollout={"stages": STAGES, "webhook": listener.url})
        alerts = Alerts(settings)
        rollout = plant(settings, looks=12, at_once=100, errors=(0.15, 0.01), alert=alerts.tell)
        alerts.tell("another route", {"about": "decision"})
        alerts.close()
    assert rollout.phase == "rolled_back"
    decisions = [one for one in listener.heard if one["about"] == "decision"]
    assert [one["verb"] for one in decisions] == [one.verb for one in rollout.decisions]
    assert decisions[0]["event_id"] == rollout.decisions[0].event_id
    (tripped,) = (one for one in listener.heard if one["about"] == "guardrail")
    assert (tripped["metric"], tripped["rollout"], tripped["tripped"]) == ("error_rate", rollout.id, True)
    assert {one["route"] for one in listener.heard} == {"assistant"}
