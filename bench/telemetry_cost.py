"""What hearing costs: CPU a request for its fact and its span, for a token, and how many requests a second are heard.

    python bench/telemetry_cost.py [--json] [--requests 20000] [--otlp]

The requests are made conversations of three turns, chat completions, half of them streams. Measured are

    fact       from the last byte on: reading the kept copy, hashes of the thread, the capture policy, metrics, the fact
               and the journal's thread that puts it on disk; CPU of the whole process, and how long the caller is held
    short      the same of unary answers of a dozen words
    paced      the same at 500 requests a second, where the caller need not wait for its own last fact
    span       the same with spans sent to a real receiver in another process, less the same without
    token      issuing and verifying one feedback token
    detection  a controller that takes in the same facts, a third of them with a complaint and a third with thanks:
               threads, detectors, rewards, sums; the process does nothing else

All in one run on one core; compare the numbers of one run only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gateway import providers
from gateway.arms import Route
from gateway.auth import KeyRing, Pseudonyms, TokenSigner, identify
from gateway.metrics import Metrics
from gateway.openai import parse_request
from gateway.proxy import Proxy
from gateway.sessions import Sessions
from gateway.visit import Errand, Visit
from router.arms import Choice, Snapshot
from router.controller import Controller
from router.plan import RoutePlan
from router.policy import Arm, Reward, Thompson
from router.recall import JournalAssignments
from router.store_sqlite import SqliteStore
from telemetry.events import Interaction, new_id
from telemetry.journal import Journal
from telemetry.privacy import Capture, Captures
from telemetry.writer import JournalWriter

ARMS = {"a": Arm(model="base"), "b": Arm(model="good")}
WORDS = ("the contract says that a tenant may keep one small dog if nobody", "in the house is afraid of it at night")
REACTIONS = ("No, that is wrong. Try again!", "Thanks, that helps.", "What about cats?")
BARS = {"fact": 40.0, "span": 20.0, "verify": 20.0, "detected": 1000.0}


def texts(seed: int, n: int) -> str:
    chance = np.random.default_rng(seed)
    words = " ".join(WORDS).split()
    return " ".join(words[i] for i in chance.integers(0, len(words), n))


def conversations(n: int, words: int) -> list[tuple[int, list[dict[str, str]], str]]:
    """(number of its conversation, messages, answer) of each of about n requests; `words` in an answer."""
    found = []
    for c in range(-(-n // 3)):
        messages = [{"role": "system", "content": texts(0, words // 2)}]
        for turn in range(3):
            asked = REACTIONS[c % len(REACTIONS)] if turn == 2 else texts(10 * c + turn, words // 3)
            messages = [*messages, {"role": "user", "content": asked}]
            answer = texts(10 * c + turn + 5, words)
            found.append((c, messages, answer))
            messages = [*messages, {"role": "assistant", "content": answer}]
    return found[:n]


def copy_of(answer: str, stream: bool, name: str) -> bytes:
    """The upstream's bytes."""
    if not stream:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        usage = {"prompt_tokens": 99, "completion_tokens": 120}
        return json.dumps({"id": f"chatcmpl-{name}", "choices": [choice], "usage": usage}).encode()
    pieces = [answer[i : i + 6] for i in range(0, len(answer), 6)]
    events = [{"id": f"chatcmpl-{name}", "choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    events.append({"id": f"chatcmpl-{name}", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"


def facts(
    n: int,
    folder: Path,
    told: Callable[[Interaction], None] | None = None,
    *,
    words: int = 120,
    streams: float = 0.5,
    pace: float = 0.0,
) -> dict[str, float]:
    """µs a request of leaving its fact on disk, and how long its caller is held up.

    `streams`: the share of answers that are streams; `pace`: seconds from one request to the next, 0 for none.
    """
    writer = JournalWriter(folder / f"{new_id()}.db")
    metrics = Metrics()
    hide = Pseudonyms(b"k" * 32)
    route = Route("assistant", ARMS, [], None)  # type: ignore[arg-type]
    state = folder / "state.db"
    snapshot = Snapshot("assistant", 1, 0.0, "thompson", 0.0, {"": {"a": 0.5, "b": 0.5}})
    sessions = Sessions(SqliteStore(state), JournalAssignments(state), {"assistant": snapshot})

    def note(fact: Interaction) -> None:
        writer.put(fact)
        if told is not None:
            told(fact)

    proxy = Proxy(
        {"assistant": route}, KeyRing(False), sessions, TokenSigner({"0": b"t" * 32}), hide,
        Captures(Capture("full")), metrics, note, providers.ask, 1 << 20,
    )  # fmt: skip
    caller = KeyRing(False).caller(b"")
    choice = Choice("a", 0.5, 1, "", False, "thompson")
    work = []
    for number, (c, messages, answer) in enumerate(conversations(n, words)):
        stream = number % 100 < 100 * streams
        body = json.dumps({"model": "assistant", "messages": messages, "stream": stream}).encode()
        ask, fields = parse_request(body)
        who = identify(caller, {b"x-understudy-session": b"s%d" % c}, ask, fields, hide)
        visit = Visit("chat/completions", {})
        visit.request_id, visit.status, visit.stream = new_id(), 200, stream
        visit.begin_trace()
        visit.keep(copy_of(answer, visit.stream, visit.request_id))
        work.append((visit, Errand(route, proxy.lineups.of("assistant"), choice, ask, fields, who)))
    took = np.zeros(len(work))
    began, started = time.process_time(), time.perf_counter()
    for i, (visit, errand) in enumerate(work):
        if pace:
            time.sleep(max(0.0, started + i * pace - time.perf_counter()))
        at = time.perf_counter()
        proxy.recorder.record(visit, errand)
        took[i] = time.perf_counter() - at
    writer.close(120)
    used = time.process_time() - began
    sessions.close()
    return {
        "cpu_us": round(used / len(work) * 1e6, 1),
        "caller_median_us": round(float(np.median(took)) * 1e6, 1),
        "caller_p99_us": round(float(np.quantile(took, 0.99)) * 1e6, 1),
    }


def _receive(ports: Any) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ports.send(server.server_port)
    server.serve_forever()


def spans(n: int, folder: Path) -> dict[str, float]:
    """The same as `facts` with spans, and what they add."""
    from telemetry.otel import Spans

    here, there = multiprocessing.get_context("spawn").Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=_receive, args=(there,), daemon=True)
    receiver.start()
    dropped: list[int] = []
    without = [facts(n, folder)["cpu_us"] for _ in range(2)]
    out = Spans(f"http://127.0.0.1:{here.recv()}", dropped.append)
    began = time.process_time()
    found = facts(n, folder, out.answered)
    spent = time.process_time() - began
    out.close()
    receiver.terminate()
    with_spans = round(found["cpu_us"] + (time.process_time() - began - spent) / n * 1e6, 1)
    return {"cpu_us": with_spans, "added_us": round(with_spans - float(np.mean(without)), 1), "dropped": sum(dropped)}


def tokens(n: int) -> dict[str, float]:
    signer = TokenSigner({"0": b"t" * 32, "1": b"u" * 32})
    began = time.process_time()
    made = [signer.issue("default", new_id(), "u" * 24, 1000.0) for _ in range(n)]
    issued = time.process_time()
    for token in made:
        signer.verify(token, 1001.0)
    verified = time.process_time()
    return {"issue_us": round((issued - began) / n * 1e6, 2), "verify_us": round((verified - issued) / n * 1e6, 2)}


def detection(n: int, folder: Path) -> dict[str, float]:
    """Facts a second that a controller takes in, until all is heard and counted."""
    path = folder / "heard.db"
    writer, journal = JournalWriter(path), Journal(path)
    made: list[Interaction] = []
    facts(n, folder, made.append)
    now = time.time()
    for i, fact in enumerate(made):  # as they come at 100 a second
        writer.put(msgspec.structs.replace(fact, at=now - 3600 + i / 100, duration=0.005))
    writer.close(120)
    plan = RoutePlan("assistant", ARMS, Thompson(kind="thompson"), Reward())
    store = SqliteStore(folder / "heard-state.db")
    controller = Controller([plan], journal, store, "bench")
    began, used = time.perf_counter(), time.process_time()
    while controller.step(time.time()) or store.marked("journal") < journal.last():
        pass
    seconds, used = time.perf_counter() - began, time.process_time() - used
    signals = journal.counts().get("signal", 0)
    journal.close()
    store.close()
    return {
        "requests": len(made),
        "signals": signals,
        "requests_per_second": round(len(made) / seconds, 0),
        "cpu_us": round(used / len(made) * 1e6, 1),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {
            "fact": facts(options.requests, folder),
            "short_fact": facts(options.requests, folder, words=12, streams=0.0),
            "paced_fact": facts(options.requests // 5, folder, pace=0.002),
            "span": spans(options.requests, folder),
            "token": tokens(options.requests),
            "detection": detection(options.requests, folder),
        }
    rows = [
        ("CPU of a span, µs", found["span"]["added_us"], BARS["span"], True),
        ("the caller's p99 for a fact, µs", found["paced_fact"]["caller_p99_us"], 1000.0, True),
        ("verifying a token, µs", found["token"]["verify_us"], BARS["verify"], True),
        ("requests heard a second", found["detection"]["requests_per_second"], BARS["detected"], False),
    ]
    found["bars"] = [
        {"what": what, "value": value, "bar": bar, "met": value <= bar if most else value >= bar}
        for what, value, bar, most in rows
    ]
    return found


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--requests", type=int, default=20_000, help="how many (20,000)")
    about.add_argument("--quick", action="store_true", help="few: shows that it works")
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    options.requests = 300 if options.quick else options.requests
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name in ("fact", "short_fact", "paced_fact", "span", "token", "detection"):
        print(f"{name:<12}", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found[name].items()))
    for row in found["bars"]:
        print(f"{'met ' if row['met'] else 'MISS'}  {row['what']}: {row['value']} (bar {row['bar']:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
