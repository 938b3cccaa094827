"""Does each request find the answer that it continues? Threads on recorded and on made conversations.

    python bench/threading_replay.py DATA.jsonl [--json]

DATA has a stateless chat request a line: {"user": …, "t": seconds since the user's session began, "messages": [OpenAI
messages], "response": text}. All users' sessions run at once, so their requests mix. A request with an assistant turn
continues the user's earlier row whose response is that turn; it is linked right if it finds that row. Once with the
users known, once with nothing but one API key for all.

Made conversations: `--conversations` of them, mixed in time, in two tenants that say the same things. Many open with
the same words and get answers that begin alike; answers are regenerated and users go on from either; users go back and
put a turn differently; apps put the time into the system prompt, trim white space, strip reasoning, send back an edited
answer, and drop the oldest turns. Half of the users are known. A link is right if it names the very request whose
answer the app went on from; precision counts wrong ones among those made, recall those made among all.

Also measured: microseconds to hash a ten-turn conversation, bytes of memory a remembered request.

Where an answer was edited, the likest of the answers to the same input is taken, by the texts, as the controller does.

Left out: two answers of one input that are equal word for word (which one a user went on from nobody can tell).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tracemalloc
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from telemetry.events import Answerer, Interaction
from telemetry.threads import Threads, thread_of
from telemetry.wording import canonical, grams, likeness

KEY = b"bench"
ANSWERER = Answerer("a", "base")
Messages = list[dict[str, Any]]


def request(
    name: str, at: float, messages: Messages, answer: str, *, user: str | None = None, tenant: str = "t"
) -> Interaction:
    return Interaction(
        event_id=name, at=at, request_id=name, route="r", tenant=tenant, session=name, answerer=ANSWERER, user=user,
        thread=thread_of(tenant, messages, answer, [], KEY),
    )  # fmt: skip


@dataclass
class Score:
    """Counts of links."""

    due: int = 0
    right: int = 0
    wrong: int = 0
    missed: list[str] = field(default_factory=list)

    def count(self, found: str | None, truth: str | None, name: str) -> None:
        self.due += truth is not None
        if found is not None and found == truth:
            self.right += 1
        elif found is not None:
            self.wrong += 1
        if found != truth:
            self.missed.append(name)

    def shown(self) -> dict[str, Any]:
        made = self.right + self.wrong
        return {
            "due": self.due,
            "right": self.right,
            "wrong": self.wrong,
            "precision": round(self.right / made, 5) if made else None,
            "recall": round(self.right / self.due, 5) if self.due else None,
            "missed": self.missed[:20],
        }


def recorded(path: Path, known: bool) -> Score:
    """Links of the requests in `path`, in the order of their times."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = sorted(((row["t"], n, row) for n, line in enumerate(lines, 1) if line for row in [json.loads(line)]))
    threads, score = Threads(), Score()
    answers: dict[tuple[str, str], str] = {}
    for t, n, row in rows:
        last = next((m["content"] for m in reversed(row["messages"]) if m["role"] == "assistant"), None)
        user = str(row["user"])
        new = request(str(n), float(t), row["messages"], row["response"], user=user if known else None)
        truth = answers.get((user, last)) if last is not None else None
        score.count(threads.find(new), truth, f"line {n}")
        threads.add(new)
        answers[user, row["response"]] = str(n)
    return score


class Maker:
    """Makes conversations; each step appends (time, request, the request whose answer it continues)."""

    OPENINGS = ("hi", "Hello!", "I need help with my order", "write a python function", "summarise this")

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.made: list[tuple[float, Interaction, str | None]] = []
        self.answers = 0
        self.answered: dict[str, str] = {}
        self.returned: dict[str, str] = {}
        """By request: its answer, and the last assistant turn that it carries."""

    def words(self, most: int) -> str:
        return " ".join(self.chance.choice(WORDS) for _ in range(self.chance.randint(2, most)))

    def answer(self, opening: bool) -> str:
        self.answers += 1
        reasoning = f"<think>\n{self.words(9)}\n</think>\n\n" if self.chance.random() < 0.1 else ""
        start = "Hello! How can I help you today?\n" if opening else ""
        return f"{reasoning}{start}{self.words(40)} {self.answers if self.chance.random() < 0.9 else self.words(8)}"

    def conversation(self, number: int) -> None:
        chance = self.chance
        tenant = chance.choice(("acme", "umbrella"))
        user = f"u{chance.randrange(3000)}" if chance.random() < 0.5 else None
        at = chance.uniform(0.0, 50_000.0)
        history: Messages = []
        came_from: str | None = None
        habit = chance.choice(("plain", "plain", "clock", "trims", "drops", "edits"))
        for turn in range(chance.randint(1, 7)):
            said = chance.choice(self.OPENINGS) if turn == 0 and chance.random() < 0.6 else self.words(25)
            if came_from is not None and chance.random() < 0.1:  # goes back and puts the last turn differently
                self.ask(tenant, user, at, history, said, came_from, habit, f"{number}-{turn}-before")
                at += chance.uniform(5.0, 90.0)
                said = self.words(25)
            branches = [(f"{number}-{turn}-{n}", n) for n in range(2 if chance.random() < 0.15 else 1)]
            answers = []
            for name, _ in branches:
                answers.append((name, self.ask(tenant, user, at, history, said, came_from, habit, name)))
                at += chance.uniform(2.0, 60.0)
            came_from, answer = chance.choice(answers)
            if habit == "edits" and chance.random() < 0.5:  # and the app keeps it so
                kept = answer.split(" ")
                answer = " ".join([*kept[: max(1, len(kept) * 2 // 3)], self.words(6)])
            history = [*history, {"role": "user", "content": said}, {"role": "assistant", "content": answer}]
            at += chance.uniform(3.0, 300.0)

    def ask(
        self, tenant: str, user: str | None, at: float, history: Messages, said: str, came_from: str | None,
        habit: str, name: str,
    ) -> str:  # fmt: skip
        """One request, sent as the app's habit is; its answer."""
        chance = self.chance
        sent = [dict(message) for message in history]
        for message in sent:
            if message["role"] == "assistant" and habit != "plain":
                message["content"] = message["content"].rpartition("</think>")[2]
                message["content"] = message["content"].strip() if habit == "trims" else message["content"]
        if habit == "drops":
            sent = sent[-2 * chance.randint(1, 3) :]
        system = f"You are of help. It is {at:.0f}." if habit == "clock" else "You are of help."
        messages = [{"role": "system", "content": system}, *sent, {"role": "user", "content": said}]
        answer = self.answered[name] = self.answer(opening=not history)
        self.returned[name] = sent[-1]["content"] if sent else ""
        self.made.append((at, request(name, at, messages, answer, user=user, tenant=tenant), came_from))
        return answer


WORDS = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ta", "ru") for b in ("", "ne", "so", "pi") for c in ("n", "r", "s", "l")
]


def synthetic(conversations: int, seed: int) -> tuple[Score, int]:
    """Links of made conversations, and how many of them were across tenants."""
    maker = Maker(seed)
    for number in range(conversations):
        maker.conversation(number)
    threads, score, across = Threads(), Score(), 0
    tenants = {}

    def alike(name: str, new: str) -> float:
        return likeness(grams(canonical(maker.answered[name])), grams(canonical(maker.returned[new])))

    for _, new, truth in sorted(maker.made, key=lambda step: (step[0], step[1].event_id)):
        found = threads.find(new, partial(alike, new=new.event_id))
        across += found is not None and tenants[found] != new.tenant
        score.count(found, truth, new.event_id)
        threads.add(new)
        tenants[new.event_id] = new.tenant
    return score, across


def costs() -> dict[str, float]:
    """Microseconds to hash a conversation of ten turns; bytes that a remembered request takes."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": "how do I sort a list of words? " * 6} for n in range(9)]
    spans = []
    for _ in range(200):
        began = time.perf_counter()
        thread_of("tenant", turns, "Use sorted(words). " * 10, [], KEY)
        spans.append(time.perf_counter() - began)
    requests = [request(str(n), float(n), [{"role": "user", "content": str(n)}], "yes") for n in range(5000)]
    tracemalloc.start()
    threads = Threads()
    for one in requests:
        threads.add(one)
    size = tracemalloc.get_traced_memory()[0] / len(requests)
    tracemalloc.stop()
    return {"hash_ten_turns_us": round(sorted(spans)[100] * 1e6, 1), "bytes_a_request": round(size)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    known, unknown = recorded(options.data, True), recorded(options.data, False)
    made, across = synthetic(options.conversations, options.seed)
    bars = [
        ("recorded, users known: recall", known.shown()["recall"], 0.998),
        ("recorded, one API key: recall", unknown.shown()["recall"], 0.99),
        ("made: precision", made.shown()["precision"], 0.999),
        ("made: recall", made.shown()["recall"], 0.99),
        ("made: no link across tenants", 1.0 - across, 1.0),
    ]
    return {
        "bars": [{"what": w, "value": v, "bar": b, "met": v is not None and v >= b} for w, v, b in bars],
        "recorded_users_known": known.shown(),
        "recorded_one_key": unknown.shown(),
        "made": made.shown() | {"conversations": options.conversations, "across_tenants": across},
        "costs": costs(),
    }


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("data", type=Path, help="recorded chat requests, JSON lines")
    about.add_argument("--conversations", type=int, default=10_000, help="made conversations (10,000)")
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    data = measure(options)
    if options.json:
        print(json.dumps(data, indent=2))
        return 0
    for name in ("recorded_users_known", "recorded_one_key", "made"):
        row = data[name]
        print(
            f"{name:<22}{row['due']:>7} due {row['right']:>7} right {row['wrong']:>4} wrong  missed {row['missed'][:5]}"
        )
    print(data["costs"])
    for bar in data["bars"]:
        print(f"{'met ' if bar['met'] else 'MISS'}  {bar['what']}: {bar['value']} (bar {bar['bar']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
