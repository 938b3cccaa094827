"""What the gate lets through, what it refuses, and what it leaves open; and the report that it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from learner import gate_report
from learner.gate import Check, Report, decide
from learner.halves import Row, evidence, holm
from learner.measured import Duel, GoldenResult, Measured, Preference, Referee, Side
from learner.plan import Gate, Judge, Margins

PEOPLE = 41
JUDGE = Referee(name="judge:scripted", agreement=0.75, least=0.69, pairs=200, asked=1200, failed=3)


def both(champion: Any, challenger: Any) -> dict[Side, Any]:
    return {"champion": champion, "challenger": challenger}


def duel(n: int, **other: Any) -> Duel:
    """Six of ten are won, by everybody alike; every 50th answer of either version has each fault."""
    faulty = both(n % 50 == 7, n % 50 == 8)
    fields: dict[str, Any] = {
        "id": f"duel{n:04}",
        "user": f"user{n % PEOPLE}",
        "prompt": f"prompt {n}",
        "answers": both(f"old answer {n}", f"new answer {n}"),
        "tokens": both(50 + n % 30, 50 + (n + 1) % 30),
        "seconds": both(1.0 + n % 7 / 10, 1.0 + (n + 1) % 7 / 10),
        "score": 1.0 if (n // PEOPLE) % 10 < 6 else 0.0,
        "repetitive": faulty,
        "broken": faulty,
        "refused": faulty,
        "divergence": 0.3,
    }
    return Duel(**{**fields, **other})


def preference(n: int, **other: Any) -> Preference:
    """The champion ranks 70 % as people did, the challenger the same."""
    right = 0.4 if n % 10 < 7 else -0.2
    fields: dict[str, Any] = {
        "id": f"pair{n:04}",
        "user": f"user{n % PEOPLE}",
        "signal": ("comparison", "edit")[n // PEOPLE % 2],
        "cohort": ("en", "de")[n // PEOPLE % 2],
        "dataset": ("now", "earlier")[n // (2 * PEOPLE) % 2],
        "champion": right,
        "challenger": right,
    }
    return Preference(**{**fields, **other})


def golden(n: int, kind: str = "text", holds: bool | None = True, must: bool = False) -> GoldenResult:
    return GoldenResult(
        id=f"{kind}{n}", owner="geo-team", kind=kind, passed=both(True, holds), why=both("", "not in it"),  # type: ignore[arg-type]
        answers=both("Paris", "Lyon"), must=must,
    )  # fmt: skip


def measured(**other: Any) -> Measured:
    fields: dict[str, Any] = {
        "champion": "v1",
        "challenger": "v2",
        "dataset": "d" * 64,
        "agreement": 1.0,
        "preferences": tuple(map(preference, range(820))),
        "duels": tuple(map(duel, range(820))),
        "goldens": tuple(golden(n) for n in range(10)),
        "referee": JUDGE,
    }
    return Measured(**{**fields, **other})


def duels(count: int = 820, **change: Callable[[int], Any]) -> tuple[Duel, ...]:
    return tuple(duel(n, **{name: of(n) for name, of in change.items()}) for n in range(count))


def pairs(count: int = 820, **change: Callable[[int], Any]) -> tuple[Preference, ...]:
    return tuple(preference(n, **{name: of(n) for name, of in change.items()}) for n in range(count))


def found(report: Report, name: str) -> Check:
    check = report.check(name)
    assert check is not None, [one.name for one in report.checks]
    return check


def test_one_that_wins_and_is_worse_in_nothing_passes() -> None:
    report = decide(measured(), Gate())
    assert report.verdict == "pass", report.why
    assert report.main.name == "win rate"
    assert report.main.value == pytest.approx(0.6)
    assert report.main.lower is not None
    assert 0.5 < report.main.lower < 0.6
    assert "60.0%" in report.why
    assert found(report, "length").limit == 1.1
    assert report.divergence == pytest.approx(0.3)


def test_one_that_is_like_the_champion_is_left_open_and_it_says_how_much_would_tell() -> None:
    report = decide(measured(duels=duels(205, score=lambda n: float((n + n // PEOPLE) % 2))), Gate())
    assert report.verdict == "inconclusive"
    assert report.main.verdict == "inconclusive"
    assert "items would find 5 points" in report.main.why


def is_slow(n: int) -> dict[Side, float]:
    return both(1.0, 2.0 + n % 3 / 10)


def now(n: int) -> int:
    """Of ten pairs, how many it ranks as people did: all of this round's, four of the earlier one's."""
    return 4 if n // (2 * PEOPLE) % 2 else 10


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "not served": ("served", {"agreement": None}),
    "not as it was trained": ("served", {"agreement": 0.97}),
    "verbose": ("length", {"duels": duels(tokens=lambda n: both(50 + n % 30, 70 + n % 30))}),
    "slow": ("seconds", {"duels": duels(seconds=is_slow)}),
    "empty": ("collapse", {"duels": duels(broken=lambda n: both(False, n % 10 < 6))}),
    "broken": ("broken", {"duels": duels(broken=lambda n: both(n % 50 == 7, n % 10 == 8))}),
    "repetitive": ("repetitive", {"duels": duels(repetitive=lambda n: both(False, n % 11 == 0))}),
    "over-refusing": ("refuses more", {"duels": duels(refused=lambda n: both(n % 50 == 7, n % 11 == 8))}),
    "refusals lost": ("refuses less", {"duels": duels(refused=lambda n: both(n % 11 == 7, False))}),
    "refusals of goldens lost": (
        "goldens to refuse",
        {"goldens": tuple(golden(n, "refuse", n > 7) for n in range(10))},
    ),
    "goldens lost": ("goldens", {"goldens": tuple(golden(n, "tool_call", n > 9) for n in range(20))}),
    "a golden that must hold": ("goldens that must hold", {"goldens": (golden(1, must=True, holds=False),)}),
    "loses": ("win rate", {"duels": duels(score=lambda n: float(n // PEOPLE % 10 < 3))}),
    "flipped": ("collapse", {"preferences": pairs(challenger=lambda n: -0.4 if n % 10 < 7 else 0.2)}),
    "ranks worse": ("preference", {"preferences": pairs(challenger=lambda n: 0.4 if n % 10 < 5 else -0.2)}),
    "worse for some": (
        "preference, cohort de",
        {"preferences": pairs(challenger=lambda n: 0.4 if n % 10 < (7 if n // PEOPLE % 2 == 0 else 4) else -0.2)},
    ),
    "forgot": (
        "preference, round earlier",
        {"preferences": pairs(challenger=lambda n: 0.4 if n % 10 < now(n) else -0.2)},
    ),
    "margins that are no numbers": ("collapse", {"preferences": pairs(challenger=lambda _: math.nan)}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_challenger_fails_by_the_check_that_is_for_it_with_what_decided(name: str) -> None:
    check, fault = BAD[name]
    report = decide(measured(**fault), Gate())
    assert report.verdict == "fail"
    failed = found(report, check)
    assert failed.verdict == "fail", failed
    assert check in report.why
    assert failed.why
    if check != "served":
        assert 1 <= len(failed.examples) <= 3


REFEREES = {
    "away": Referee(name="nobody", why="no judge answers"),
    "down": replace(JUDGE, failed=400),
    "never compared with people": replace(JUDGE, agreement=None, least=None, pairs=0),
    "a coin": replace(JUDGE, agreement=0.5, least=0.44),
    "hardly better than a coin": replace(JUDGE, agreement=0.55, least=0.47, pairs=100),
    "no number": replace(JUDGE, agreement=math.nan, least=math.nan),
}


@pytest.mark.parametrize("name", REFEREES)
def test_wins_by_a_referee_who_cannot_be_trusted_are_neither_passed_nor_failed(name: str) -> None:
    for score in (1.0, 0.0):
        told = measured(duels=duels(score=lambda _, score=score: score), referee=REFEREES[name])
        report = decide(told, Gate())
        assert report.verdict == "inconclusive"
        assert report.main.verdict == found(report, "referee").verdict == "inconclusive"
        assert report.main.why == found(report, "referee").why
        assert report.again == (name == "down")


def test_a_judge_that_was_asked_for_and_is_down_blocks_even_where_it_is_not_the_main_metric() -> None:
    better = pairs(challenger=lambda n: 0.4 if n % 10 < 8 else -0.2)
    told = measured(preferences=better, referee=REFEREES["down"])
    assert decide(told, Gate(main="preference")).verdict == "pass"
    assert decide(told, Gate(main="preference", judge=Judge(model="openai/judge"))).verdict == "inconclusive"


def test_duels_that_nobody_could_tell_do_not_count_as_won() -> None:
    told = measured(duels=duels(score=lambda n: 1.0 if n < 200 else None))
    report = decide(told, Gate())
    assert (report.main.n, report.verdict, report.again) == (200, "inconclusive", True)
    assert "620 of 820 duels" in report.why
    report = decide(measured(duels=duels(score=lambda _: None)), Gate())
    assert report.verdict == "inconclusive"


def test_with_preference_as_the_main_metric_it_must_rank_more_pairs_as_people_did_and_not_lose_duels() -> None:
    policy = Gate(main="preference")
    better = pairs(challenger=lambda n: 0.4 if n % 10 < 8 else -0.2)
    report = decide(measured(preferences=better), policy)
    assert (report.verdict, report.main.name) == ("pass", "preference")
    assert report.main.value == pytest.approx(0.1)
    assert decide(measured(), policy).main.verdict == "inconclusive"
    lost = decide(measured(preferences=better, duels=duels(score=lambda n: float(n // PEOPLE % 10 < 3))), policy)
    assert found(lost, "duels lost").verdict == "fail"


def test_few_users_are_not_enough_however_many_duels_they_give() -> None:
    report = decide(measured(duels=duels(user=lambda n: f"user{n % 5}", score=lambda _: 1.0)), Gate())
    assert report.verdict == "inconclusive"
    assert "5 users" in report.main.why


def test_one_loud_user_does_not_decide() -> None:
    def score(n: int) -> float:
        return 1.0 if n % 10 else float(n // PEOPLE % 2)

    alone = {"user": lambda n: "loud" if n % 10 else f"user{n % 400}", "score": score}
    report = decide(measured(duels=duels(**alone)), Gate())
    assert report.main.value is not None
    assert report.main.value > 0.9
    assert report.main.verdict == "inconclusive"


def test_faults_that_were_not_seen_in_a_few_answers_are_not_ruled_out() -> None:
    def never(_: int) -> dict[Side, bool]:
        return both(False, False)

    few = {"broken": never, "refused": never, "repetitive": never}
    report = decide(measured(duels=duels(60, **few)), Gate())
    assert found(report, "broken").verdict == "inconclusive"
    assert found(report, "broken").blocks
    assert found(decide(measured(duels=duels(**few)), Gate()), "broken").verdict == "pass"


def test_six_users_are_not_taken_for_a_fault_among_so_many_things_that_are_looked_at() -> None:
    lost = pairs(
        cohort=lambda n: "few" if n % PEOPLE < 6 else "en",
        challenger=lambda n: -0.2 if n % PEOPLE < 6 or n % 10 > 7 else 0.4,
    )
    check = found(decide(measured(preferences=lost), Gate()), "preference, cohort few")
    assert check.value is not None
    assert check.value > 0.6
    assert check.p_worse is not None
    assert check.p_worse > 0.05, "alone it would be 0.02; there are a dozen guards"
    assert check.verdict == "inconclusive"


def test_a_guard_needs_users_as_the_main_metric_does() -> None:
    of_thirteen = measured(duels=duels(user=lambda n: f"user{n % 13}"))
    assert found(decide(of_thirteen, Gate()), "broken").verdict == "inconclusive"
    assert found(decide(of_thirteen, Gate(min_users=13)), "broken").verdict == "pass"


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300])
def test_odd_numbers_are_neither_passed_nor_too_much(odd: float) -> None:
    strange = duels(
        score=lambda n: odd if n % 2 else 1.0,
        seconds=lambda n: both(1.0, odd if n % 3 else 1.0),
        tokens=lambda n: both(0, 0),
        divergence=lambda _: odd,
    )
    for policy in (Gate(), Gate(main="preference"), Gate(max_divergence=0.5)):
        report = decide(measured(duels=strange, preferences=pairs(challenger=lambda _: odd)), policy)
        assert report.verdict != "pass"
        assert b"NaN" not in msgspec.json.encode(report)
        assert gate_report.page(report)


def test_a_small_cohort_is_reported_and_does_not_block() -> None:
    few = pairs(cohort=lambda n: "tiny" if n % PEOPLE < 3 else "en")
    report = decide(measured(preferences=few), Gate())
    tiny = found(report, "preference, cohort tiny")
    assert (tiny.verdict, tiny.blocks, tiny.users) == ("inconclusive", False, 3)
    assert report.verdict == "pass"


def test_one_golden_of_ten_may_be_luck_two_are_looked_into_and_those_nobody_could_tell_block() -> None:
    def of(*holds: bool | None) -> Check:
        more = tuple(golden(n, holds=one) for n, one in enumerate((*holds, *[True] * (10 - len(holds)))))
        return found(decide(measured(goldens=more), Gate()), "goldens")

    assert of(False).verdict == "pass"
    assert of(False, False).verdict == "inconclusive"
    assert of(None, None, None).verdict == "inconclusive"
    five = measured(goldens=tuple(golden(n, holds=n > 0) for n in range(5)))
    assert found(decide(five, Gate()), "goldens").verdict == "pass"
    tenth = measured(goldens=tuple(golden(n, holds=n > 9) for n in range(100)))
    assert found(decide(tenth, Gate(margins=Margins(goldens=0.05))), "goldens").verdict == "fail"
    assert found(decide(tenth, Gate(margins=Margins(goldens=0.2))), "goldens").verdict == "pass"
    must = decide(measured(goldens=(golden(1, "rubric", None, must=True),)), Gate())
    assert found(must, "goldens that must hold").verdict == must.verdict == "inconclusive"


def test_what_was_not_measured_is_never_passed() -> None:
    empty = decide(measured(duels=(), preferences=(), goldens=()), Gate())
    assert empty.verdict == "inconclusive"
    assert found(empty, "broken").why.endswith("nothing was measured")
    assert "there are no goldens" in " ".join(empty.notes)
    assert msgspec.json.decode(msgspec.json.encode(empty), type=Report) == empty


def test_margins_are_the_operators() -> None:
    longer = measured(duels=duels(tokens=lambda n: both(50 + n % 30, 60 + n % 30)))
    assert decide(longer, Gate()).verdict == "fail"
    assert decide(longer, Gate(max_length_ratio=1.5)).verdict == "pass"
    refuses = measured(duels=duels(refused=lambda n: both(n % 50 == 7, n % 25 == 8)))
    assert decide(refuses, Gate()).verdict != "pass"
    assert decide(refuses, Gate(margins=Margins(refusals=0.1))).verdict == "pass"
    far = decide(measured(), Gate(max_divergence=0.1))
    assert found(far, "divergence").verdict == far.verdict == "fail"


def test_the_same_measurements_in_any_order_give_the_same_bytes() -> None:
    told = measured()
    turned = measured(duels=told.duels[::-1], preferences=told.preferences[::-1], goldens=told.goldens[::-1])
    first, again, other = (msgspec.json.encode(decide(one, Gate(), seed=3)) for one in (told, told, turned))
    assert first == again == other


def test_what_decided_is_of_one_user_each_the_worst_first() -> None:
    worst = {5: 400, 46: 390, 6: 300, 7: 200, 8: 100}
    report = decide(measured(duels=duels(tokens=lambda n: both(50, worst.get(n, 58)))), Gate())
    assert [one.id for one in found(report, "length").examples] == ["duel0005", "duel0006", "duel0007"]
    assert found(report, "length").examples[0].prompt == "prompt 5"
    assert "400 tokens" in found(report, "length").examples[0].note
    assert all("it won" in one.note for one in decide(measured(), Gate()).main.examples)


# ---- the test ----


def test_of_alike_versions_five_in_a_hundred_at_most_seem_better_though_users_are_few_and_unlike() -> None:
    """Student's t over users' sums says so in 16 of 100 of these."""
    chance, runs, told = np.random.default_rng(5), 400, 0
    share = np.arange(1, 21.0) ** -1.5
    for run in range(runs):
        n = chance.multinomial(300, share / share.sum())
        won = chance.binomial(n, chance.beta(2.5, 2.5, 20))
        rows = [Row(f"{user}", float(won[user]), float(n[user])) for user in range(20) if n[user]]
        told += evidence(rows, run, (0.0, 1.0)).p_above(0.5) <= 0.05
    assert told / runs < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_bounds_and_p_values_say_the_same() -> None:
    chance = np.random.default_rng(0)
    for seed in range(20):
        rows = [Row(f"u{int(chance.integers(12))}", float(chance.normal(0.2))) for _ in range(60)]
        one = evidence(rows, seed)
        lower, upper = one.interval(0.05)
        for limit in (lower, upper, lower - 1e-9, upper + 1e-9, 0.0, 0.2):
            assert (one.p_above(limit) <= 0.05) == (lower > limit)
            assert (one.p_below(limit) <= 0.05) == (upper < limit)


def test_users_of_one_opinion_show_as_much_as_their_number_allows() -> None:
    for users in (3, 6, 9):
        one = evidence([Row(f"{user}", 1.0) for user in range(users)], 0)
        assert one.p_above(0.0) == pytest.approx(2.0**-users, abs=0.015)
        assert (one.interval(0.05)[0] > 0) == (users > 4)


def test_holm_is_as_in_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# ---- the report ----


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "style") or name.startswith("on")
        ]
        if tag not in ("meta", "br", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_verdict_numbers_and_what_decided_and_runs_nothing(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    told = duels(tokens=lambda n: both(50, 80), prompt=lambda _: evil, answers=lambda _: both(evil, evil))
    report = decide(measured(duels=told, challenger=f"v2{evil}", notes=(evil,)), Gate())
    paths = gate_report.write(tmp_path / "made", report)
    page = Page(paths.page.read_text("utf-8"))
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert page.links == []
    assert page.open == []
    assert page.text.count(evil) >= 6
    assert "fail" in page.text
    assert "1.6" in page.text
    assert found(report, "length").why in page.text


def test_what_is_written_can_be_read_again_and_nothing_else_lies_beside_it(tmp_path: Path) -> None:
    report = decide(measured(), Gate())
    paths = gate_report.write(tmp_path, report)
    before = paths.json.read_bytes()
    assert gate_report.read(tmp_path).report == report
    assert json.loads(before)["report"]["verdict"] == "pass"
    gate_report.write(tmp_path, report)
    assert paths.json.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.html", "gate.json"]


def test_a_page_that_cannot_be_put_there_leaves_what_was(tmp_path: Path) -> None:
    report = decide(measured(), Gate())
    paths = gate_report.write(tmp_path, report)
    before = paths.json.read_bytes()
    paths.page.unlink()
    (paths.page / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"gate\.html"):
        gate_report.write(tmp_path, decide(measured(agreement=None), Gate()))
    assert paths.json.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.html", "gate.json"]


def test_a_damaged_report_says_which_file_and_what_to_do(tmp_path: Path) -> None:
    for body in (None, b"", b"[]", b"[" * 100_000, b"\xff"):
        if body is not None:
            (tmp_path / "gate.json").write_bytes(body)
        with pytest.raises(gate_report.BadReport, match=r"gate.json cannot be read.*again"):
            gate_report.read(tmp_path)


def test_a_users_text_can_be_taken_out_and_the_numbers_stay() -> None:
    report = decide(measured(duels=duels(tokens=lambda n: both(50, 80 + (n == 5)))), Gate())
    (gone, *rest) = found(report, "length").examples
    clean = gate_report.without(report, users={gone.user})
    assert "new answer 5" not in gate_report.page(clean)
    assert found(clean, "length").value == found(report, "length").value
    assert found(clean, "length").examples[1:] == tuple(rest)
    assert gate_report.without(report, ids={gone.id}) == clean


def test_what_the_registry_keeps_holds_no_text_of_users() -> None:
    report = decide(measured(duels=duels(tokens=lambda n: both(50, 80))), Gate())
    kept = json.dumps(gate_report.summary(report))
    assert "answer" not in kept
    assert json.loads(kept)["checks"]["length"] == "fail"
    assert json.loads(kept)["main"]["value"] == pytest.approx(0.6)
