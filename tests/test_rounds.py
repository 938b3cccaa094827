"""When a round of learning begins, and that only one process works on it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from learner.due import Due, Facts, Look, due
from learner.plan import Learner
from learner.rounds import LEASE, Busy, is_gone, last_round, owner_name, working
from router.store_sqlite import SqliteStore

DAY = 86400.0
PLAN = Learner(base="./base", min_pairs=100, every="7d", min_interval="1d")


def facts(**more: object) -> Facts:
    seen = {"new_pairs": 10, "pairs": 500, "judged": 200, "negative": 10}
    rest = {"now": 100 * DAY, "last_began": 98 * DAY, "challenger": None, "wanted": 0}
    look = Look(**seen | {key: value for key, value in more.items() if key in seen})  # type: ignore[arg-type]
    return Facts(**rest | {key: value for key, value in more.items() if key in rest}, seen=look)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"new_pairs": 100}, "100 new pairs"),
        ({"negative": 41}, "bad in 7 days"),
        ({"last_began": 92 * DAY}, "7 days since the last round"),
        ({"last_began": 0.0, "new_pairs": 100}, "100 new pairs"),
    ],
)
def test_a_round_is_due_for_new_pairs_bad_answers_or_time(more: dict[str, object], reason: str) -> None:
    assert reason in (due(facts(**more), PLAN).reason or "")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"negative": 40},
        {"judged": 40, "negative": 40},
        {"last_began": 92 * DAY, "new_pairs": 0},
        {"negative": 41, "new_pairs": 0},
        {"last_began": 0.0},
    ],
)
def test_nothing_is_due_without_a_reason_or_anything_new(more: dict[str, object]) -> None:
    found = due(facts(**more), PLAN)
    assert found.reason is None
    assert "new pairs are needed" in found.waiting


def test_the_shortest_interval_holds_for_every_reason_but_force() -> None:
    early = facts(new_pairs=1000, last_began=99.5 * DAY)
    assert "12.0 h" in due(early, PLAN).waiting
    assert due(early, PLAN, force=True) == Due("forced", new_pairs=1000)


def test_there_is_one_challenger_at_a_time_even_by_force() -> None:
    found = due(facts(new_pairs=1000, challenger="assistant-v2-00000000"), PLAN, force=True)
    assert found.reason is None
    assert "assistant-v2-00000000 is the challenger" in found.waiting


def test_after_a_challenger_with_too_little_to_learn_from_more_is_waited_for() -> None:
    few = facts(new_pairs=200, wanted=1000)
    assert due(few, PLAN) == Due(None, due(few, PLAN).waiting, 200)
    assert "500 more new pairs are needed (1000 in all" in due(few, PLAN).waiting
    assert due(facts(new_pairs=200, pairs=1000, wanted=1000), PLAN).reason == "200 new pairs"
    assert due(facts(new_pairs=200, wanted=1000, last_began=92 * DAY), PLAN).reason == "7 days since the last round"


def test_with_more_pairs_comes_another_pace() -> None:
    plan = Learner(base="b", every="3d", phases=[{"pairs": 1000, "every": "30d"}, {"pairs": 400, "every": "10d"}])
    assert due(facts(pairs=100, last_began=96 * DAY), plan).reason == "3 days since the last round"
    assert due(facts(pairs=500, last_began=96 * DAY), plan).reason is None
    assert due(facts(pairs=500, last_began=89 * DAY), plan).reason == "10 days since the last round"
    assert due(facts(pairs=5000, last_began=80 * DAY), plan).reason is None


def test_a_second_process_is_told_who_is_at_work(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    with working(store, "assistant", "far-away:1:a", lambda: 1000.0) as state:
        state.begin("new pairs", 5)
        with pytest.raises(Busy, match=r"far-away:1:a .*works on route assistant.*in 50 s"):
            working(store, "assistant", "here:2:b", lambda: 1010.0).__enter__()
    with working(store, "assistant", "here:2:b", lambda: 1011.0) as state:  # it was given back
        assert (state.round.number, state.round.step) == (1, "dataset")


def test_who_was_taken_for_dead_finds_out_at_the_next_step(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    with working(store, "assistant", "far-away:1:a", lambda: 1000.0) as slow:
        slow.begin("new pairs", 5)
        with working(store, "assistant", "here:2:b", lambda: 1001.0 + LEASE) as state:
            state.put(replace(state.round, step="train"))
            with pytest.raises(Busy, match="taken over"):
                slow.put(replace(slow.round, step="failed"))
    assert last_round(store, "assistant").step == "train"


def test_a_process_of_this_machine_that_is_no_more_is_not_waited_for(tmp_path: Path) -> None:
    script = "from learner.rounds import owner_name; print(owner_name())"
    gone = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert is_gone(gone)
    machine = owner_name().partition(":")[0]
    assert not is_gone(f"{machine}:{os.getppid()}:x")
    assert not is_gone(f"elsewhere:{os.getpid()}:x")
    assert is_gone(f"{machine}:{os.getpid()}:who had our number before us")
    store = SqliteStore(tmp_path / "s.db")
    held = working(store, "assistant", gone)
    held.__enter__().begin("new pairs", 5)
    with working(store, "assistant", owner_name()) as state:
        assert state.round.step == "dataset"
    held.__exit__(None, None, None)


def _begin(path: str, name: str, out: multiprocessing.Queue[str]) -> None:
    try:
        with working(SqliteStore(Path(path)), "assistant", name) as state:
            state.begin(name, 1)
            out.put(name)
            out.close()
            out.join_thread()
            while os.path.exists(f"{path}.hold"):
                pass
    except Busy:
        out.put("")


def test_a_clock_that_was_ahead_holds_nobody_up_for_long(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    year = 365 * DAY
    held = working(store, "assistant", "far-away:1:a", lambda: 1000.0 + year)
    held.__enter__().begin("new pairs", 5)
    with working(store, "assistant", "here:2:b", lambda: 1000.0) as state:
        assert state.round.step == "dataset"
    assert due(facts(last_began=101 * DAY, new_pairs=100), PLAN).reason == "100 new pairs"


def test_a_write_whose_answer_was_lost_is_known_as_our_own(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    with working(store, "assistant", "here:2:b") as state:
        stands = store.read("learning/assistant")
        assert store.swap("learning/assistant", stands, (stands or b"").replace(b'"tries":0', b'"tries":1'))
        state.put(replace(state.round, step="train"))
    assert last_round(store, "assistant").step == "train"


def test_a_round_of_another_version_of_the_code_makes_its_spec_anew(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    body = b'{"number":3,"step":"train","reason":"x","began":1.0,"spec":{"base":"b","later_field":1}}'
    assert store.swap("learning/assistant", None, body)
    found = last_round(store, "assistant")
    assert (found.number, found.step, found.spec) == (3, "train", None)


def test_of_many_processes_at_once_one_begins(tmp_path: Path) -> None:
    (tmp_path / "s.db.hold").touch()
    SqliteStore(tmp_path / "s.db").close()
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    them = [context.Process(target=_begin, args=(str(tmp_path / "s.db"), f"m{n}:1:x", out)) for n in range(4)]
    for one in them:
        one.start()
    names = [out.get(timeout=30) for _ in them]
    (tmp_path / "s.db.hold").unlink()
    for one in them:
        one.join(30)
    assert len([name for name in names if name]) == 1
