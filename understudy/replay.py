"""`understudy replay`: recorded conversations through a running gateway, with the real `openai` client.

A file is JSON lines, each a stateless chat request as it was sent: `user`, `task`, `t` (seconds since the user's
session began), `messages`, and `copies` (what the user copied from the recorded answer). Users follow one another, each
under an identity of its own; half of the requests stream. A copy is posted as feedback on the live answer.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai


class BadRecording(ValueError):
    """The file is not a recording; the message names the line."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of a recording."""

    user: str
    task: str
    t: float
    messages: list[dict[str, Any]]
    copies: list[dict[str, Any]]


@dataclass
class Tally:
    """What happened so far."""

    requests: int = 0
    streamed: int = 0
    failures: list[str] = field(default_factory=list)
    unanswerable: int = 0
    """Requests recorded without a message, to which the upstream's own 400 came back."""
    signals: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    """Requests by the model that said it answered: which arm served."""
    seconds: list[float] = field(default_factory=list)
    first_byte: list[float] = field(default_factory=list)
    wall: float = 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "streamed": self.streamed,
            "failures": len(self.failures),
            "failure_examples": self.failures[:5],
            "unanswerable": self.unanswerable,
            "arms": dict(self.models.most_common()),
            "signals": dict(self.signals.most_common()),
            "latency_ms": _quantiles(self.seconds),
            "first_byte_ms": _quantiles(self.first_byte),
            "wall_seconds": round(self.wall, 2),
        }


def _quantiles(seconds: list[float]) -> dict[str, float] | None:
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {name: round(1000 * cuts[p - 1], 1) for name, p in (("p50", 50), ("p90", 90), ("p99", 99))}


def read(path: Path) -> list[Recorded]:
    """The recording's requests. Raises `BadRecording` that names the line, and `OSError`."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append(
                    Recorded(
                        str(row["user"]),
                        str(row.get("task", "")),
                        float(row.get("t", 0)),
                        list(row["messages"]),
                        list(row.get("copies") or ()),
                    )
                )
            except (ValueError, TypeError, KeyError) as error:
                raise BadRecording(f"{path}:{number}: not a recorded request: {error!r}") from None
    if not rows:
        raise BadRecording(f"{path}: no requests in it")
    return rows


def by_user(rows: list[Recorded]) -> Iterator[list[Recorded]]:
    users: dict[str, list[Recorded]] = {}
    for row in rows:
        users.setdefault(row.user, []).append(row)
    for requests in users.values():
        yield sorted(requests, key=lambda row: row.t)


def play(
    rows: list[Recorded],
    base_url: str,
    route: str,
    *,
    as_fast: bool,
    api_key: str = "replay",
    max_tokens: int | None = None,
    progress: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Send all `rows`; keep the recorded pauses between one user's requests unless `as_fast`."""
    base_url = base_url.rstrip("/")
    base_url = base_url if base_url.endswith("/v1") else base_url + "/v1"
    tally, began = Tally(), time.perf_counter()
    with openai.OpenAI(base_url=base_url, api_key=api_key, timeout=180) as client:
        for requests in by_user(rows):
            user_began = time.perf_counter()
            for row in requests:
                if not as_fast:
                    time.sleep(max(0.0, row.t - requests[0].t - (time.perf_counter() - user_began)))
                _send(client, row, route, tally, max_tokens)
                progress(tally)
    tally.wall = time.perf_counter() - began
    return tally


def _send(client: openai.OpenAI, row: Recorded, route: str, tally: Tally, max_tokens: int | None) -> None:
    stream = tally.requests % 2 == 1
    tally.requests += 1
    tally.streamed += stream
    headers = {
        "x-understudy-user": f"user-{row.user}",
        "x-understudy-session": f"user-{row.user}-{row.task}",
        "x-understudy-task": row.task,
    }
    began = time.perf_counter()
    try:
        request: dict[str, Any] = {"model": route, "messages": row.messages, "extra_headers": headers}
        if max_tokens is not None:
            request["max_tokens"] = max_tokens
        answer_id = model = ""
        if stream:
            for chunk in client.chat.completions.create(**request, stream=True):
                if not answer_id:
                    tally.first_byte.append(time.perf_counter() - began)
                answer_id, model = chunk.id, chunk.model
        else:
            answer = client.chat.completions.create(**request)
            answer_id, model = answer.id, answer.model
        if not answer_id:
            raise openai.OpenAIError("the stream ended without a chunk")
        tally.seconds.append(time.perf_counter() - began)
        tally.models[model] += 1
        items = [
            {"response_id": answer_id, "kind": "copy", "text": copy.get("copied"), "user": headers["x-understudy-user"]}
            for copy in row.copies
        ]
        if items:
            taken = client.post("/feedback", body=items, cast_to=dict[str, Any])
            tally.signals["copy"] += taken["accepted"]
            if taken["accepted"] != len(items):
                raise openai.OpenAIError(f"{len(items) - taken['accepted']} feedback items were refused")
    except openai.BadRequestError as error:
        if row.messages:
            tally.failures.append(f"request {tally.requests}: {error}")
        else:
            tally.unanswerable += 1
    except openai.OpenAIError as error:
        tally.failures.append(f"request {tally.requests}: {error}")
