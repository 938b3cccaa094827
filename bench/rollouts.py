"""Thousands of simulated rollouts through the real controller: what it decides, and how often it is wrong.

    python bench/rollouts.py                    # 1,000 of each of ten kinds; some minutes on two cores
    python bench/rollouts.py --quick --json     # seconds; the numbers mean little

A champion and a challenger share the sessions of a route in stages of 5, 20, 50 and 100 %, each for at least 50 judged
sessions of the challenger and 60 s. Sessions come ten a second and are drawn by `router.bandit.draw` from the weights
that the controller would publish: Thompson sampling (floor 0.02, holdout 0.05) or fixed shares, under the stage's cap
(`router.casting`). 70 % of them are judged, with 0 or 1 at a mean of 0.6 for the champion, 10 s later; 1 % fail and 1 %
are flagged; answers take 1 s in the middle (log-normal). Every 250 sessions `RolloutController.look` decides, with α =
0.05, a margin of 0.02 and the guardrails that rollouts have by default and one for p99, until it has ended, paused, or
5,000 sessions have come (40,000 where something breaks).

equal, split     the challenger is as good; split: with fixed shares
worse, better    by that much of reward
drift            as good, and the level of both goes up and down by 0.15 in waves of their own length
late             rewards come up to 150 s late
errors, slow     once the challenger has 20 %: a fifth of its sessions fail; its answers take three times as long

Bars: an equal challenger is rolled back, and one that is 0.05 worse promoted, in at most 5 % of the rollouts; no stage
gives more sessions than its share but for chance (4.5 standard errors, all of a kind together, 6 in one); none is left
too early; an error spike or slow answers end every rollout, and in the weights that follow a guardrail's trip the
challenger has none. ± is one standard error. Sessions are those of both arms since the rollout began.

Left out: segments, several turns, the journal (evidence is put into the trial in bulk), shadows, operators.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # also from a checkout that is not installed

from router.arms import Cell, Snapshot, Sums
from router.bandit import bucket_of, draw
from router.casting import billed, capped, cast, fitting, split_shares, with_challenger
from router.policy import Arm, Policy, Split, Thompson
from router.rollout import Alias, given
from router.rollout_controller import RolloutController, load, propose
from router.rollout_policy import GUARDRAILS, Guardrail, Rollout, Stage
from router.trial import ROW
from router.weights import shares

ROUTE, VERSION, LEAD = "r", "r-v1-00000000", "champion"
BEGAN = 1_000_000.0
PER_SECOND, LOOK, MOST = 10.0, 250, 5000
JUDGED, BASE, FAILS, FLAGGED = 0.7, 0.6, 0.01, 0.01
STAGES = tuple(Stage(share=share, min_sessions=50, min_time=60.0) for share in (0.05, 0.2, 0.5, 1.0))
POLICY = Rollout(
    stages=STAGES,
    guardrails=(*GUARDRAILS, Guardrail(metric="latency_p99", worse_by=2.0, action="rollback")),
    interval=1.0,
)
ARMS = {LEAD: Arm(model="base")}


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    difference: float = 0.0
    drift: float = 0.0
    delay: float = 10.0
    breach: str = ""
    split: bool = False
    rolled_back: float = 1.0
    """Bars: the largest shares of rollouts that may end so."""
    promoted: float = 1.0
    stopped: float = 0.0
    """The smallest share that must be rolled back."""


KINDS = [
    Kind("equal", rolled_back=0.05),
    Kind("equal, split", split=True, rolled_back=0.05),
    Kind("drift", drift=0.15, rolled_back=0.05),
    Kind("late", delay=150.0, rolled_back=0.05),
    Kind("0.05 worse", -0.05, promoted=0.05),
    Kind("0.05 worse, late, drift", -0.05, drift=0.15, delay=150.0, promoted=0.05),
    Kind("0.10 worse", -0.1, promoted=0.05),
    Kind("0.10 better", 0.1, rolled_back=0.05),
    Kind("errors", breach="errors", stopped=1.0),
    Kind("slow", breach="slow", stopped=1.0),
]


class Memory:
    """Documents, aliases and tags of one rollout."""

    def __init__(self) -> None:
        self._documents: dict[str, bytes] = {}
        self._aliases: dict[Alias, str] = {}
        self._tags: dict[str, dict[str, str]] = {}

    def read(self, name: str) -> bytes | None:
        return self._documents.get(name)

    def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        if self._documents.get(name) != old or new is None:
            return False
        self._documents[name] = new
        return True

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self._documents if name.startswith(prefix))

    def aliases(self, route: str) -> Mapping[Alias, str]:
        return dict(self._aliases)

    def move_all(self, route: str, moves: Mapping[Alias, tuple[str | None, str | None]]) -> bool:
        if any(self._aliases.get(alias) != expected for alias, (expected, _) in moves.items()):
            return False
        wanted = self._aliases | {alias: to for alias, (_, to) in moves.items()}  # type: ignore[operator]
        self._aliases = {alias: to for alias, to in wanted.items() if to is not None}
        return True

    def tag(self, name: str, key: str, value: str | None) -> None:
        self._tags.setdefault(name, {})[key] = value or ""

    def tags(self, name: str) -> Mapping[str, str]:
        return self._tags.get(name, {})


@dataclass(slots=True)
class Story:
    """What happened in one rollout."""

    ended: str = ""
    why: str = ""
    sessions: int = 0
    drawn: dict[float, tuple[int, int]] = field(default_factory=dict)
    """By cap: sessions, and those of the challenger."""
    early: int = 0
    """Steps that were left too early."""
    after: int = 0
    """Sessions that the challenger got after it was rolled back."""
    breach: float = math.nan
    """Seconds from the first bad session to weights without the challenger."""


def play(kind: Kind, seed: tuple[int, ...]) -> Story:
    random = np.random.default_rng(seed)
    memory, story = Memory(), Story()
    rollouts = RolloutController(ROUTE, POLICY, memory, memory, lambda _: None, lambda _: 0)
    propose(memory, memory, ROUTE, VERSION, "bench", "simulated", BEGAN)
    policy: Policy = Split(kind="split", shares={LEAD: 1.0}) if kind.split else Thompson()
    phase, length = random.uniform(0, 2 * math.pi), random.uniform(300, 3000)
    cells: dict[Cell, Sums] = {}
    due = np.zeros(0, [("at", "f8"), ("row", "i8"), ("ours", "?"), ("reward", "f8")])  # rewards that will be known
    broken = math.nan
    step_began, judged = BEGAN, 0
    step = -1
    for block in range((8 * MOST if kind.breach else MOST) // LOOK + 1):
        now = BEGAN + block * LOOK / PER_SECOND
        rollouts.find()
        for reward in due[due["at"] <= now]:
            assert rollouts.trial is not None
            row = rollouts.trial.rows[reward["row"]]
            row["reward"], row["reacted"] = reward["reward"], True
            judged += bool(reward["ours"] and row["at"] >= step_began)
            cell = Cell("", VERSION if reward["ours"] else LEAD, bucket_of(row["at"]))
            r = float(reward["reward"])
            cells[cell] = cells.get(cell, Sums()).plus(Sums(1.0, r, r * r))
        due = due[due["at"] > now]
        rollout = rollouts.look(now, LEAD, lambda: BASE, None)
        assert rollout is not None
        if rollout.step != step and rollout.phase == "running":
            least = STAGES[max(0, step)]
            story.early += step >= 0 and (judged < least.min_sessions or now - step_began < least.min_time)
            step, step_began, judged = rollout.step, now, 0
        story.ended, story.why, story.sessions = rollout.phase, rollout.why, block * LOOK
        if rollout.phase == "promoted":
            story.early += step != len(STAGES) - 1 or judged < STAGES[-1].min_sessions
        snapshot = published(policy, memory, cells, now)
        if rollout.phase not in ("pending", "running"):
            story.after = sum(draw(snapshot, float(u)).arm == VERSION for u in random.random(LOOK))
            story.breach = now - broken
            break
        if rollouts.trial is None:
            rollouts.find()
        assert rollouts.trial is not None
        bad = kind.breach if given(POLICY, rollout.step) >= 0.2 else ""
        broken = now if bad and math.isnan(broken) else broken
        moments = now + np.arange(LOOK) / PER_SECOND
        rows = np.zeros(LOOK, ROW)
        rows["at"] = moments
        choices = [draw(snapshot, u) for u in random.random(LOOK).tolist()]
        assert {choice.rollout for choice in choices} == {rollout.id}
        served = np.array([choice.arm == VERSION for choice in choices])
        own, other = (np.array([getattr(choice, name) for choice in choices]) for name in ("propensity", "rival"))
        rows["ours"], rows["p"], rows["k"] = served, np.where(served, own, other), np.where(served, other, own)
        level = BASE + kind.difference * served + kind.drift * np.sin(phase + 2 * math.pi * moments / length)
        rows["error"] = random.random(LOOK) < np.where(served & (bad == "errors"), 0.2, FAILS)
        rows["latency"] = np.exp(0.5 * random.standard_normal(LOOK)) * np.where(served & (bad == "slow"), 3.0, 1.0)
        rows["first_byte"] = rows["latency"] / 4
        rows["reward"] = math.nan
        rows["flagged"] = random.random(LOOK) < FLAGGED
        heard = np.flatnonzero(random.random(LOOK) < JUDGED)
        coming = np.zeros(heard.size, due.dtype)
        coming["at"] = moments[heard] + random.uniform(0.2, 1.0, heard.size) * kind.delay
        coming["row"], coming["ours"] = len(rollouts.trial.rows) + heard, served[heard]
        coming["reward"] = random.random(heard.size) < level[heard]
        due = np.concatenate([due, coming])
        rollouts.trial.add(rows)
        cap = given(POLICY, rollout.step)
        n, ours = story.drawn.get(cap, (0, 0))
        story.drawn[cap] = n + LOOK, ours + int(served.sum())
    return story


def published(policy: Policy, memory: Memory, cells: Mapping[Cell, Sums], now: float) -> Snapshot:
    """As `Controller.snapshot` makes it, but for what has no part here."""
    playing = cast(ARMS, memory.aliases(ROUTE))
    rollout = load(memory, ROUTE)[1]
    assert rollout is not None
    parts = with_challenger(playing, ARMS, rollout, POLICY)
    if isinstance(policy, Split):
        return billed(Snapshot(ROUTE, 1, now, policy.kind, 0.0, split_shares(policy, parts)), parts)
    policy = fitting(policy, len(parts.arms))
    assert not isinstance(policy, Split)
    segments = capped(shares(policy, parts.arms, cells, now), parts, policy.holdout)
    return billed(Snapshot(ROUTE, 1, now, policy.kind, policy.holdout, segments), parts)


def play_many(job: tuple[int, int, int, int]) -> list[Story]:
    kind, first, last, seed = job
    return [play(KINDS[kind], (seed, kind, n)) for n in range(first, last)]


# Telling.


def told(kind: Kind, stories: list[Story]) -> dict[str, Any]:
    n = len(stories)
    ends = Counter(story.ended for story in stories)
    why = Counter(_short(story.why) for story in stories if story.ended in ("rolled_back", "paused"))
    shares_, worst = {}, 0.0
    for cap in sorted({cap for story in stories for cap in story.drawn}):
        drawn = [story.drawn[cap] for story in stories if cap in story.drawn]
        share = sum(ours for _, ours in drawn) / sum(all_ for all_, _ in drawn)
        z = (share - cap) / math.sqrt(max(1e-12, cap * (1 - cap)) / sum(all_ for all_, _ in drawn))
        worst = max(worst, *((o - cap * m) / math.sqrt(max(1e-9, cap * (1 - cap) * m)) for m, o in drawn))
        shares_[f"{cap:g}"] = {"share": share, "z": min(z, 99.0) if cap < 1.0 else 0.0}
    sessions = [story.sessions for story in stories if story.ended in ("promoted", "rolled_back")]
    breaches = [story.breach for story in stories if story.ended == "rolled_back" and not math.isnan(story.breach)]
    rates = {end: ends[end] / n for end in ("promoted", "rolled_back", "paused", "running")}
    over = max([one["z"] for one in shares_.values()])
    early, after = sum(story.early for story in stories), sum(s.after for s in stories if s.ended == "rolled_back")
    return {
        **rates,
        "why": dict(why.most_common()),
        "median_sessions": float(np.median(sessions)) if sessions else None,
        "shares": shares_,
        "most_over_its_share": worst,
        "left_early": early,
        "drawn_after_rollback": after,
        "seconds_from_breach": {"median": float(np.median(breaches)), "most": max(breaches)} if breaches else None,
        "kept": {
            "rolled back": rates["rolled_back"] <= kind.rolled_back,
            "promoted": rates["promoted"] <= kind.promoted,
            "stopped": rates["rolled_back"] >= kind.stopped,
            "shares": over < 4.5 and worst < 6.0,
            "minimums": early == 0,
            "none after": after == 0,
        },
    }


def _short(why: str) -> str:
    return " ".join(why.split(" (")[0].split()[:2]) if why.startswith("guardrail") else why.split(":")[0]


def run(options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    size = max(1, min(50, options.runs))
    jobs = [
        (kind, first, min(first + size, options.runs), options.seed)
        for first in range(0, options.runs, size)
        for kind in range(len(KINDS))
    ]
    found: list[list[Story]] = [[] for _ in KINDS]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for job, stories in zip(jobs, pool.map(play_many, jobs), strict=True):
            found[job[0]] += stories
    results = {kind.name: told(kind, stories) for kind, stories in zip(KINDS, found, strict=True)}
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "runs": options.runs,
        "rollouts": options.runs * len(KINDS),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "kinds": results,
        "kept": all(all(one["kept"].values()) for one in results.values()),
    }


def show(data: dict[str, Any]) -> None:
    print(f"$ {data['command']}\n{data['rollouts']:,} rollouts, seed {data['seed']}, {data['seconds']} s\n")
    print(f"{'kind':<25}{'promoted':>16}{'rolled back':>16}{'paused':>9}{'sessions':>10}  shares by stage")
    for name, one in data["kinds"].items():
        cells = [_rate(one[end], data["runs"]) for end in ("promoted", "rolled_back")]
        sessions = "–" if one["median_sessions"] is None else f"{one['median_sessions']:,.0f}"
        given_ = " ".join(f"{float(cap):.0%}:{at['share']:.1%}" for cap, at in one["shares"].items())
        print(f"{name:<25}{cells[0]:>16}{cells[1]:>16}{one['paused']:>9.2%}{sessions:>10}  {given_}")
    print()
    for name, one in data["kinds"].items():
        said = ", ".join(f"{why} {n}" for why, n in one["why"].items())
        gone = one["seconds_from_breach"]
        soon = f"; breach to 0 %: {gone['median']:.0f} s (at most {gone['most']:.0f})" if gone else ""
        broken = [bar for bar, kept in one["kept"].items() if not kept]
        print(f"{name:<25}{'BROKEN: ' + ', '.join(broken) + '; ' if broken else ''}{said}{soon}")
    print("\nbars kept" if data["kept"] else "\nbars BROKEN")


def _rate(share: float, n: int) -> str:
    return f"{share:.2%} ± {math.sqrt(share * (1 - share) / n):.2%}"


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--runs", type=int, help="rollouts of each kind (1,000; at most 100,000)")
    about.add_argument("--seed", type=int, default=1)
    about.add_argument("--json", action="store_true", help="print JSON")
    about.add_argument("--quick", action="store_true", help="2 of each kind: shows that it works, measures little")
    options = about.parse_args()
    options.runs = min(options.runs or (2 if options.quick else 1000), 100_000)
    if options.runs < 1:
        about.error("--runs: at least 1")
    data = run(options)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        show(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
