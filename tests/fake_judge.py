"""An OpenAI-compatible server whose model judges as it is told to, and misbehaves when told to."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from learner.judge import Judge, JudgeModel

Parts = dict[str, str]
"""What stands between marks, by its name: REQUEST, ANSWER A, ANSWER B, RUBRIC, …"""
Says = Callable[[Parts], str | int | float | None]
"""A reply, an error's status, seconds to wait before a reply of no worth, or None to hang up."""
_PART = re.compile(r"\[(?P<mark>[0-9a-f]{16}) (?P<name>[A-Z ]+)\]\n(?P<text>.*?)\n\[(?P=mark) END OF (?P=name)\]", re.S)


def says(verdict: str) -> str:
    return json.dumps({"why": "so it is", "verdict": verdict})


def longer(parts: Parts) -> str:
    """Whatever is longer is better."""
    a, b = len(parts["ANSWER A"]), len(parts["ANSWER B"])
    return says("tie" if a == b else "A" if a > b else "B")


def holding(word: str) -> Says:
    """Better is what holds the word."""

    def judge(parts: Parts) -> str:
        a, b = (word in parts[name] for name in ("ANSWER A", "ANSWER B"))
        return says("tie" if a == b else "A" if a else "B")

    return judge


def parts_of(question: list[dict[str, str]]) -> Parts:
    return {found["name"]: found["text"] for found in _PART.finditer(question[-1]["content"])}


class FakeJudge:
    """From `with` on, at `url`."""

    def __init__(self, judge: Says) -> None:
        self.judge = judge
        self.seen: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with fake._lock:
                    fake.seen.append(body)
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    self.reply(body, fake.judge(parts_of(body["messages"])))
                finally:
                    with fake._lock:
                        fake.at_once -= 1

            def reply(self, body: dict[str, Any], given: str | int | float | None) -> None:
                if given is None:
                    return
                if isinstance(given, float):
                    fake._ended.wait(given)
                    given = "too late"
                status = given if isinstance(given, int) else 200
                message = {"role": "assistant", "content": given}
                said = json.dumps(
                    {"error": {"message": "no", "type": "server_error"}}
                    if status != 200
                    else {
                        "id": "1", "object": "chat.completion", "created": int(time.time()), "model": body["model"],
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                    }
                ).encode()  # fmt: skip
                try:
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(said)))
                    self.end_headers()
                    self.wfile.write(said)
                except OSError:
                    pass  # who asked did not wait

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked_by(self, **model: Any) -> Judge:
        return Judge(JudgeModel("openai/fake", self.url, "none", **model))
