"""How often the detectors are right: on generated sessions, on editors' real edits, on real users' next turns.

    python bench/detectors.py --conversations FILE.jsonl --edits FOLDER --json      # a few seconds
    python bench/detectors.py --quick                                               # what needs no data

regenerate, user_edit   Sessions made up with the truth known: turns, regenerations, edits of the last turn, and what
        looks like them: SDK retries, requests side by side, second tries after a fault, pollers (4 to 40 times),
        templates filled anew (with examples, and without), the same template from different users, new questions
        on the same instructions. Each request meets the answer that it continues, or else the last one of its session
        (of the tenant, where users share a template): the most tempting one. Edits of a first turn, for which
        only wording can speak, are reported by themselves; a word put in another's place looks like a template there.
edit    Real edits (FOLDER/*.json: [{preedit, postedit}]) as turns that came back, against harmless reformattings of
        the same texts and of real answers: layout, Markdown, quotes, entities, reasoning, labels, cuts.
rephrase    Adjacent user turns of FILE ({user, t, messages, response} a line), labelled by reading:
        labels/rephrase.json has the rule and who read. Only pairs with a label are counted. The pause is from request
        to request, for the file does not say how long answers took. The wording rule was chosen on these very labels.
stop    Streams that users stopped, against all other ways to end.

The reformattings, and what undoes them, were written side by side. Intervals are Wilson's, 95 %. Left out: complaint
and thanks, which have no labels; how well answers are matched.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import math
import random
import re
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # also from a checkout that is not installed

from telemetry.events import Answerer, Interaction, Signal
from telemetry.signals import RULES, detect
from telemetry.wording import said_again, turns

LABELS = Path(__file__).parent / "labels" / "rephrase.json"
SUBJECTS = [
    "tides",
    "bridges",
    "sourdough",
    "inflation",
    "chess",
    "tax law",
    "jazz",
    "glaciers",
    "vaccines",
    "compilers",
]
ASKS = ["Explain {}.", "How do {} work?", "Write three lines about {}.", "Compare {} with {}.", "List facts on {}."]
VOICES = ["for a child", "in one sentence", "with an example", "as a table", "for an expert", "in plain words"]

FAULTS = ("upstream_cut", "upstream_timeout", "upstream_refused", "upstream_error", "internal")

Row = dict[str, Any]


def ratio(hits: int, n: int) -> dict[str, Any]:
    """A share with Wilson's 95 % interval; None where nothing was counted."""
    if n == 0:
        return {"value": None, "low": None, "high": None, "hits": 0, "n": 0}
    z, p = 1.96, hits / n
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"value": round(p, 4), "low": round(low, 4), "high": round(high, 4), "hits": hits, "n": n}


# Sessions made up.


class World:
    """Makes requests, and remembers what each of them truly was."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.cases: list[tuple[Interaction | None, Interaction, tuple[Interaction, ...]]] = []
        self.truth: dict[str, str] = {}
        self.first_edits: set[str] = set()
        self._made = 0

    def question(self) -> str:
        c = self.chance
        words = c.choice(ASKS).format(*c.sample(SUBJECTS, 2))
        return f"{words} Make it {c.choice(VOICES)}, please, about {c.randint(20, 200)} words."

    def answer(self) -> str:
        return " ".join(self.chance.choices(SUBJECTS, k=self.chance.randint(20, 80))).capitalize() + "."

    def ask(
        self,
        messages: list[Row],
        at: float,
        session: str,
        past: list[Interaction],
        *,
        before: Interaction | None = None,
        truth: str = "",
        **more: Any,
    ) -> Interaction:
        """One request at `at`, to be judged against `before`; what it truly is, "" for anything else."""
        self._made += 1
        body = json.dumps(messages).encode()
        made = Interaction(
            **{
                "event_id": f"i{self._made}", "at": at, "request_id": f"r{self._made}", "route": "assistant",
                "tenant": "t", "session": session, "answerer": Answerer("a", "m"), "user": f"u-{session}",
                "input_hash": hashlib.sha256(body).hexdigest(), "stream": True, "status": 200, "first_byte": 0.3,
                "duration": self.chance.uniform(1, 8), "messages": messages, "answer": self.answer(), **more,
            }
        )  # fmt: skip
        self.cases.append((before, made, (*past, made)))
        self.truth[made.event_id] = truth
        past.append(made)
        return made

    def pause(self) -> float:
        """How long a user reads and types, s: median 25, one in twenty over two minutes."""
        return self.chance.lognormvariate(3.2, 1.0)


def says(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def changed(world: World, text: str) -> str:
    """A turn as its user put it after thinking again: a word added, left out or replaced, or all of it new."""
    words = text.split()
    place = world.chance.randrange(1, len(words))
    way = world.chance.randrange(4)
    if way == 3:
        return world.question() + " Thank you in advance."
    return " ".join([*words[:place], *([], ["really"], ["other"])[way], *words[place + (way != 1) :]])


def chat(world: World, name: str) -> None:
    """A conversation with regenerations, edits and what befalls requests on their way."""
    past: list[Interaction] = []
    at = world.chance.uniform(0, 1e6)
    messages = [says("system", "You are helpful."), says("user", world.question())]
    last: Interaction | None = None
    for _ in range(world.chance.randint(2, 8)):
        before, last = last, world.ask(messages, at, name, past, before=last)
        at = last.at + last.duration + world.pause()
        happens = world.chance.random()
        if happens < 0.25:
            left = world.chance.random() < 0.2
            if left:
                past[-1] = last = _with(last, error="client_left", answer=last.answer[:40] if last.answer else None)
                at = last.at + last.duration + world.chance.uniform(0.2, 9)
            last = world.ask(messages, at, name, past, before=last, truth="regenerate")
        elif happens < 0.45:
            messages = [*messages[:-1], says("user", changed(world, messages[-1]["content"]))]
            first = len(messages) == 2
            made = world.ask(messages, at, name, past, before=last, truth="user_edit")
            if first:
                world.first_edits.add(made.event_id)
            last = made
        elif happens < 0.55:
            past[-1] = last = _with(last, error="upstream_timeout", answer=None, status=504)
            world.ask(messages, last.at + last.duration + 0.5, name, past, before=last, truth="retry", sdk_retry=1)
            last = past[-1]
        elif happens < 0.6:
            past[-1] = last = _with(last, error="upstream_cut", status=502)
            last = world.ask(messages, at, name, past, before=last)
        elif happens < 0.65:
            world.ask(messages, last.at + 0.1, name, past, before=last)  # side by side
        elif happens < 0.7:
            world.ask([messages[0], says("user", world.question())], at, name, past, before=before or last)
            return
        at = last.at + last.duration + world.pause()
        returned = last.answer or world.answer()
        messages = [*messages, says("assistant", returned), says("user", world.question())]


def _with(i: Interaction, **fields: Any) -> Interaction:
    return Interaction(**({name: getattr(i, name) for name in i.__struct_fields__} | fields))


def poller(world: World, name: str) -> None:
    """A machine that asks the same at a steady rhythm."""
    past: list[Interaction] = []
    every, at = math.exp(world.chance.uniform(math.log(10), math.log(1200))), world.chance.uniform(0, 1e6)
    messages = [says("user", f"Is there news on {world.chance.choice(SUBJECTS)} for {name}?")]
    for n in range(world.chance.randint(4, 40)):
        when = at + n * every + world.chance.gauss(0, 0.05 + 0.005 * min(every, 60))
        world.ask(messages, when, name, past, before=past[-1] if past else None)


def template(world: World, name: str, examples: bool) -> None:
    """A pipeline that fills a template again and again, one after the other."""
    past: list[Interaction] = []
    at = world.chance.uniform(0, 1e6)
    shots = [says("user", "Text: the tide rose"), says("assistant", "nature")] if examples else []
    for _ in range(world.chance.randint(3, 12)):
        ask = says("user", f"Text: {world.question()}\nAnswer with one word.")
        made = world.ask([*shots, ask], at, name, past, before=past[-1] if past else None, answer="nature")
        at += made.duration + world.chance.uniform(0.1, 30)


def same_from_many(world: World, name: str) -> None:
    """The same question from different users of one tenant."""
    messages, at = [says("user", "Summarise the page that I am on.")], world.chance.uniform(0, 1e6)
    before = None
    for n in range(world.chance.randint(3, 12)):
        before = world.ask(messages, at, f"{name}-{n}", [], before=before)
        at += before.duration + world.pause()


def generated(sessions: int, seed: int) -> dict[str, Any]:
    world = World(seed)
    for n in range(sessions):
        chat(world, f"chat{n}")
    for n in range(sessions // 20):
        poller(world, f"poll{n}")
        template(world, f"shots{n}", examples=True)
        template(world, f"bare{n}", examples=False)
        same_from_many(world, f"many{n}")
    heard: dict[str, Signal] = {}
    for before, new, past in world.cases:
        for signal in detect(before, new, past):
            heard[signal.event_id] = signal  # the last one counts
    retries = {new.event_id for _, new, _ in world.cases if new.sdk_retry}
    said = {"regenerate": set[str](), "user_edit": set[str]()}
    for signal in heard.values():
        if signal.kind in said:
            said[signal.kind].add(signal.event_id.partition(":")[2])
    found: dict[str, Any] = {"requests": len(world.cases), "retries": len(retries)}
    found["retries_heard"] = sum(signal.event_id.partition(":")[2] in retries for signal in heard.values())
    for kind, ids in said.items():
        there = {one for one, truth in world.truth.items() if truth == kind} - world.first_edits
        right = ids & (there | world.first_edits)
        found[kind] = {"precision": ratio(len(right), len(ids)), "recall": ratio(len(ids & there), len(there))}
    found["first_turn_edits"] = ratio(len(said["user_edit"] & world.first_edits), len(world.first_edits))
    return found


# Edits.


def reformattings(chance: random.Random) -> dict[str, Callable[[str], tuple[str, str]]]:
    """By name: from an answer to what was sent and what comes back, which say the same."""
    place = chance.randint(30, 90) / 100

    def back(change: Callable[[str], str]) -> Callable[[str], tuple[str, str]]:
        return lambda text: (text, change(text))

    def dressed(text: str) -> str:
        return "\n".join(f"* {line}" if n % 3 else f"## **{line}**" for n, line in enumerate(text.split("\n")) if line)

    return {
        "line ends": back(lambda text: text.replace("\n", "\r\n") + "\r\n"),
        "trailing blanks": back(lambda text: "".join(f"{line}  \n" for line in text.split("\n"))),
        "blank lines": back(lambda text: re.sub(r"\n+", "\n\n\n", text)),
        "one line": back(lambda text: " ".join(text.split())),
        "wrapped": back(lambda text: "\n".join(textwrap.fill(line, 60) for line in text.split("\n"))),
        "indented": back(lambda text: textwrap.indent(text, " ")),
        "trimmed": lambda text: (f"\n\n{text}\n", text.strip()),
        "other bullets": lambda text: (re.sub(r"^", "- ", text, flags=re.M), re.sub(r"^", "* ", text, flags=re.M)),
        "marks taken off": lambda text: (dressed(text), re.sub(r"^\* |^## |\*\*", "", dressed(text), flags=re.M)),
        "fence named": lambda text: (f"```\n{text}\n```", f"```python\n{text}\n```"),
        "fence dropped": lambda text: (f"So:\n```text\n{text}\n```\nDone.", f"So:\n{text}\nDone."),
        "curly quotes": back(lambda text: text.replace("'", "’").replace('"', "”")),
        "straight quotes": back(lambda text: text.replace("’", "'").replace("“", '"').replace("”", '"')),
        "entities": back(html.escape),
        "composed": back(lambda text: unicodedata.normalize("NFD", text)),
        "hard spaces": back(lambda text: text.replace(" ", "\u00a0")),
        "thoughts dropped": lambda text: (f"<think>\nWell, {text[:90]}\n</think>\n\n{text}", text),
        "open thoughts": lambda text: (f"Let me see. {text[:50]}</think>{text}", text),
        "cut": back(lambda text: text[: int(len(text) * place)]),
        "cut, with a mark": back(lambda text: text[: int(len(text) * place)] + "…"),
        "middle cut": back(lambda text: text[: len(text) // 3] + " [...] " + text[-len(text) // 4 :]),
        "label": back(lambda text: f"Assistant: {text}"),
        "footer": back(lambda text: f"{text}\n\nSources: 1, 2"),
        "emptied": back(lambda text: ""),
    }


def returned(sent: str, back: str) -> float | None:
    """The likeness that is reported of an answer that came back as `back`; None if no edit is seen."""
    asked = [says("user", "Please write it.")]
    earlier = Interaction("e", 0.0, "r", "assistant", "t", "s", Answerer("a", "m"), messages=asked, answer=sent)
    now = [*asked, says("assistant", back), says("user", "Another one.")]
    new = Interaction("n", 60.0, "q", "assistant", "t", "s", Answerer("a", "m"), messages=now)
    return next((signal.value for signal in detect(earlier, new) if signal.kind == "edit"), None)


def edits(folder: Path, answers: list[str], n: int, seed: int) -> dict[str, Any]:
    pairs = [
        (row["preedit"], row["postedit"])
        for file in sorted(folder.glob("*.json"))
        for row in json.loads(file.read_text("utf-8"))
        if isinstance(row, dict) and row["preedit"].split() != row["postedit"].split()
    ]
    if not pairs:
        raise ValueError(f"{folder}: no *.json with pairs of `preedit` and `postedit`")
    chance = random.Random(seed)
    texts = [*(sent for sent, _ in pairs), *(text for text in answers if len(text) > 40)]
    wrong: dict[str, int] = {}
    names = list(reformattings(chance))
    for k in range(n):
        name = names[k % len(names)]
        if returned(*reformattings(chance)[name](chance.choice(texts))) is not None:
            wrong[name] = wrong.get(name, 0) + 1
    right = sum(returned(sent, back) is not None for sent, back in pairs)
    false = sum(wrong.values())
    return {
        "precision": ratio(right, right + false),
        "recall": ratio(right, len(pairs)),
        "false": ratio(false, n),
        "wrong": wrong,
    }


# Next turns.


def conversations(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("user", "t", "messages", "response")})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: not a row with user, t, messages and response: {error!r}") from None
    return rows


def adjacent(rows: list[Row]) -> Iterator[tuple[str, str, float]]:
    """The last user turns of each user's consecutive requests, and the seconds between them."""
    by_user: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["t"]):
        by_user.setdefault(row["user"], []).append(row)
    for mine in by_user.values():
        for before, new in pairwise(mine):
            last = [[text for role, text in turns(row["messages"]) if role == "user"] or [""] for row in (before, new)]
            yield last[0][-1], last[1][-1], new["t"] - before["t"]


def rephrase(rows: list[Row]) -> dict[str, Any]:
    kept = json.loads(LABELS.read_text("utf-8"))
    labels, reworded = kept["labels"], set(kept["in_other_words"])
    counts = {"pairs": 0, "unlabelled": 0}
    said: list[bool] = []
    there: list[tuple[bool, bool]] = []  # detected, in other words
    late = 0
    for before, new, gap in adjacent(rows):
        key = hashlib.sha256(f"{before}\0{new}".encode()).hexdigest()[:16]
        counts["pairs"] += 1
        if key not in labels:
            counts["unlabelled"] += 1
            continue
        hit = gap <= RULES.rephrase and said_again(new, before)
        if hit:
            said.append(labels[key])
        if labels[key]:
            there.append((hit, key in reworded))
            late += gap > RULES.rephrase
    return {
        **counts,
        "labelled": counts["pairs"] - counts["unlabelled"],
        "after_the_window": late,
        "precision": ratio(sum(said), len(said)),
        "recall": ratio(sum(hit for hit, _ in there), len(there)),
        "recall_in_like_words": ratio(sum(hit for hit, other in there if not other), sum(not o for _, o in there)),
    }


# Stops.


def stops(n: int, seed: int) -> dict[str, Any]:
    world = World(seed)
    seconds = world.chance.lognormvariate
    left = {"error": "client_left", "answer": "So far", "first_byte": 0.4}
    ways: dict[str, Callable[[], Row]] = {
        "stopped": lambda: left | {"duration": 0.4 + seconds(1.2, 0.8)},
        "complete": lambda: {"duration": seconds(1.5, 0.7)},
        "gave up before a word": lambda: left | {"duration": seconds(2, 1), "answer": None, "first_byte": None},
        "gave up with only a role": lambda: left | {"duration": seconds(2, 1), "answer": None},
        "client's time-out": lambda: (
            left | {"duration": world.chance.choice((10, 30, 60, 120, 600)) - world.chance.uniform(0, 0.05)}
        ),
        **{error: partial(lambda error: left | {"error": error, "duration": seconds(2, 1)}, error) for error in FAULTS},
        "retry, then left": lambda: left | {"duration": seconds(2, 1), "sdk_retry": 1},
    }
    found = {}
    for name, way in ways.items():
        made = [world.ask([says("user", "Go.")], 0.0, name, [], **way()) for _ in range(n)]
        found[name] = sum(any(s.kind == "stop" for s in detect(None, one)) for one in made)
    faults = {name: hits for name, hits in found.items() if name != "stopped"}
    return {"recall": ratio(found["stopped"], n), "confusion": ratio(sum(faults.values()), n * len(faults)), **found}


def hostile_ms() -> float:
    """The worst of a few ugly megabytes, milliseconds for one `detect`, best of three."""
    shapes = [
        one * (10**6 // len(one)) for one in ("a", "(", "* `", '"', " ", "<think>", "x=\n", "a b ", "[a](", "&lt;")
    ]
    worst = 0.0
    for shape in [*shapes, *("ab ... [" + shape[::-1] for shape in shapes)]:
        asked = [says("user", shape)]
        earlier = Interaction("e", 0.0, "r", "a", "t", "s", Answerer("a", "m"), messages=asked, answer="b" + shape)
        now = [*asked, says("assistant", "c" + shape), says("user", shape + "d")]
        new = Interaction("n", 60.0, "q", "a", "t", "s", Answerer("a", "m"), messages=now)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            detect(earlier, new, (earlier, new))
            times.append(time.perf_counter() - started)
        worst = max(worst, min(times) * 1000)
    return round(worst, 2)


# Telling.


def bars(data: Row) -> list[Row]:
    """Each number that has a bar: what, value with interval, bar, met (None where it was not measured)."""
    wanted = [
        ("regenerate precision", ("generated", "regenerate", "precision"), 0.99),
        ("regenerate recall", ("generated", "regenerate", "recall"), 0.99),
        ("user_edit precision", ("generated", "user_edit", "precision"), 0.99),
        ("user_edit recall", ("generated", "user_edit", "recall"), 0.99),
        ("edit precision", ("edits", "precision"), 0.99),
        ("rephrase precision", ("rephrase", "precision"), 0.90),
        ("rephrase recall", ("rephrase", "recall"), 0.60),
    ]
    rows = []
    for what, path, bar in wanted:
        one: Any = data
        for step in path:
            one = (one or {}).get(step)
        if one is not None:
            met = one["value"] is not None and one["value"] >= bar
            rows.append({"what": what, **one, "bar": f">= {bar}", "met": met})
    one = data["stops"]["confusion"]
    rows.append({"what": "stop against fault, confusion", **one, "bar": "<= 0.005", "met": one["value"] <= 0.005})
    heard = ratio(data["generated"]["retries_heard"], data["generated"]["retries"])
    rows.append({"what": "SDK retries heard", **heard, "bar": "0", "met": data["generated"]["retries_heard"] == 0})
    return rows


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--conversations", type=Path, metavar="FILE", help="real conversations, JSON a line")
    about.add_argument("--edits", type=Path, metavar="FOLDER", help="real edits, *.json")
    about.add_argument("--sessions", type=int, help="generated conversations (3,000)")
    about.add_argument("--seed", type=int, default=1)
    about.add_argument("--json", action="store_true", help="print JSON")
    about.add_argument("--quick", action="store_true", help="300 conversations")
    options = about.parse_args()
    sessions = options.sessions or (300 if options.quick else 3000)
    try:
        rows = conversations(options.conversations) if options.conversations else []
        data: Row = {"generated": generated(sessions, options.seed), "stops": stops(sessions, options.seed)}
        data["hostile_ms"] = hostile_ms()
        if options.edits:
            data["edits"] = edits(options.edits, [row["response"] for row in rows], 2000, options.seed)
        if rows:
            data["rephrase"] = rephrase(rows)
    except (OSError, ValueError) as error:
        print(f"detectors: {error}", file=sys.stderr)
        return 1
    data["bars"] = bars(data)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        for bar in data["bars"]:
            value = "–" if bar["value"] is None else f"{bar['value']:.4f} ({bar['low']:.3f}–{bar['high']:.3f})"
            met = "met" if bar["met"] else "NOT MET"
            print(f"{bar['what']:<32}{value:>26} of {bar['n']:<7}{bar['bar']:>9}  {met}")
        print(f"edits of a first turn that were seen: {data['generated']['first_turn_edits']['value']}")
        print(f"the worst megabyte: {data['hostile_ms']} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
