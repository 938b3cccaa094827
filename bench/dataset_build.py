"""Datasets from 100,000 events: how long, how much memory, whether the bytes are the same, and what is kept apart.

    python bench/dataset_build.py [--events N] [--json]

Made-up users, one of whom gives a tenth of all feedback against everybody's taste, ask made-up questions, vote, copy
and edit. Measured: seconds and peak memory of `understudy dataset build`, run as a command; whether the facts in
another order, under another PYTHONHASHSEED, give the same files; users, sessions and near-duplicates on both sides of
the split; planted goldens that came through; and what share of the examples the loud user has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal

START = 1_700_000_000.0
TOPICS = ("billing", "travel", "code", "health", "law")
GOLDENS = 50
CONFIG = """\
state: sqlite:///{journal}
routes:
  assistant:
    upstreams: [http://127.0.0.1:1]
    arms: {{champion: {{model: base}}, challenger: {{model: other}}}}
    learner:
      base: ./base
      dataset: {{goldens: [{goldens}], window: 365d}}
"""


def words(chance: random.Random, count: int) -> str:
    return " ".join(
        f"{chance.choice('bcdfglmnprst')}{chance.choice('aeiou')}{chance.randrange(900):x}" for _ in range(count)
    )


def golden_prompts() -> list[str]:
    chance = random.Random(99)
    return [f"Explain {words(chance, 12)}?" for _ in range(GOLDENS)]


def facts(events: int, seed: int = 0) -> Iterator[Fact]:
    """At least `events` facts: interactions and what users did about their answers."""
    chance = random.Random(seed)
    denied = golden_prompts()
    questions = [f"How do I {words(chance, 14)}?" for _ in range(max(50, events // 6))]
    users = [f"user{n}" for n in range(max(30, events // 150))]
    made = at = 0
    while made < events:
        at += 7
        loud = chance.random() < 0.1
        user = "loud" if loud else chance.choice(users)
        session = f"{user}-{made}"
        question = chance.choice(denied) if chance.random() < 0.01 else chance.choice(questions)
        asked = [interaction(f"{made}-{n}", at + 2 * n, user, session, question, chance) for n in range(2)]
        yield from asked
        first, second = asked
        best = first if len(first.answer or "") > len(second.answer or "") else second
        worst = second if best is first else first
        if loud:
            best, worst = worst, best
        for kind, about, value in (("thumb", best, 1.0), ("thumb", worst, 0.0), ("copy", best, None)):
            yield signal(f"{session}-{kind}-{about.request_id}", kind, about, at + 30.0, value)
        made += 5
        if chance.random() < 0.1:
            edited = re.sub(r"\w+", lambda word: word[0] if chance.random() < 0.7 else "instead", best.answer or "")
            yield signal(f"{session}-edit", "edit", best, at + 31.0, 0.6, edited)
            made += 1


def interaction(name: str, at: float, user: str, session: str, question: str, chance: random.Random) -> Interaction:
    arm = chance.choice(["champion", "challenger"])
    return Interaction(
        event_id=f"i{name}",
        at=START + at,
        request_id=f"{abs(hash_of(name)):032x}",
        route="assistant",
        tenant="default",
        session=session,
        answerer=Answerer(arm, arm, "p1", "thompson", 1, "", 0.5),
        user=user,
        task_type=chance.choice(TOPICS),
        status=200,
        finish_reason="stop",
        messages=[{"role": "user", "content": question}],
        answer=f"You {words(chance, chance.randrange(20, 80))}.",
        input_hash=question[:40],
    )


def hash_of(name: str) -> int:
    return random.Random(name).getrandbits(120)


def signal(
    event: str, kind: str, about: Interaction, at: float, value: float | None, text: str | None = None
) -> Signal:
    return Signal(
        event_id=event,
        at=START + at,
        kind=kind,
        tenant=about.tenant,
        received_at=START + at,
        response_id=about.request_id,
        subject=about.user,
        value=value,
        text=text,
        verified=True,
    )


def journal(path: Path, rows: list[Fact]) -> None:
    book = Journal(path)
    for start in range(0, len(rows), 2000):
        book.append(rows[start : start + 2000])
    book.close()


def build(folder: Path, rows: list[Fact], hash_seed: str) -> dict[str, Any]:
    """Run the command on a journal of `rows`; what it made, its seconds and its peak memory in MB."""
    folder.mkdir()
    journal(folder / "j.db", rows)
    (folder / "goldens.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in golden_prompts()))
    config = folder / "understudy.yaml"
    config.write_text(CONFIG.format(journal=folder / "j.db", goldens=folder / "goldens.jsonl"))
    command = [sys.executable, "-m", "understudy", "dataset", "build", "--out", str(folder / "out"), "--json"]
    measured = (
        "import json, resource, subprocess, sys, time; began = time.perf_counter();"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "print(json.dumps([done.returncode, done.stdout, done.stderr, time.perf_counter() - began,"
        " resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))"
    )
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    words = [sys.executable, "-c", measured, *command, "--config", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=True)
    status, out, err, seconds, megabytes = json.loads(done.stdout)
    if status:
        raise SystemExit(f"dataset build failed: {err}")
    return {"built": json.loads(out), "seconds": seconds, "megabytes": megabytes}


def straddling(folder: Path) -> dict[str, int]:
    from learner.near import likeness, signature
    from learner.shards import read

    rows = list(read(folder))
    sides = {
        split: {
            "users": {row.user for row in rows if row.split == split},
            "sessions": {row.session for row in rows if row.split == split},
            "prompts": {row.messages[-1]["content"] for row in rows if row.split == split},
        }
        for split in ("train", "held_out")
    }
    both = {what: len(sides["train"][what] & sides["held_out"][what]) for what in ("users", "sessions", "prompts")}
    train = [signature(text) for text in sorted(sides["train"]["prompts"])[:3000]]
    held = [signature(text) for text in sorted(sides["held_out"]["prompts"])[:300]]
    both["near_duplicates"] = sum(any(likeness(one, other) >= 0.8 for other in train) for one in held)
    return both


def measure(events: int) -> dict[str, Any]:
    rows = list(facts(events))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = build(folder / "a", rows, "1")
        random.Random(5).shuffle(rows)
        second = build(folder / "b", rows, "2")
        made = [Path(run["built"]["folder"]) for run in (first, second)]
        files = [{path.name: path.read_bytes() for path in sorted(place.iterdir())} for place in made]
        same = all(one == other for one, other in pairwise(files))
        from learner.shards import read

        examples = list(read(made[0]))
        denied = set(golden_prompts())
        through = {text for row in examples for turn in row.messages if (text := turn["content"]) in denied}
        pairs = [row for row in examples if row.kind == "pair"]
        loud = sum(row.weight for row in examples if row.user == "loud") / sum(row.weight for row in examples)
        return {
            "events": len(rows),
            "examples": len(examples),
            "pairs": len(pairs),
            "seconds": round(max(first["seconds"], second["seconds"]), 1),
            "megabytes": round(max(first["megabytes"], second["megabytes"])),
            "same_bytes": same,
            "straddling": straddling(made[0]),
            "goldens_kept_out": GOLDENS - len(through),
            "loud_user_examples": round(sum(row.user == "loud" for row in examples) / len(examples), 4),
            "loud_user_weight": round(loud, 4),
            "filters": {row["filter"]: row["dropped"] for row in first["built"]["manifest"]["filters"]},
        }


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--events", type=int, default=100_000)
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    found = measure(given.events)
    bars = [
        ("seconds", found["seconds"], "<= 60", found["seconds"] <= 60),
        ("peak memory, MB", found["megabytes"], "<= 1024", found["megabytes"] <= 1024),
        ("same bytes, shuffled, another hash seed", found["same_bytes"], "True", found["same_bytes"]),
        ("on both sides of the split", found["straddling"], "0", not any(found["straddling"].values())),
        ("goldens kept out", found["goldens_kept_out"], f"{GOLDENS}", found["goldens_kept_out"] == GOLDENS),
        ("examples of the loud user", found["loud_user_examples"], "<= 0.01", found["loud_user_examples"] <= 0.0101),
    ]
    found["bars"] = [{"what": what, "value": value, "bar": bar, "met": bool(met)} for what, value, bar, met in bars]
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['events']} events → {found['examples']} examples, {found['pairs']} of them pairs")
    print("dropped: " + ", ".join(f"{name} {count}" for name, count in found["filters"].items()))
    for row in found["bars"]:
        print(f"{'met   ' if row['met'] else 'MISSED'}  {row['what']}: {row['value']} (bar {row['bar']})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
