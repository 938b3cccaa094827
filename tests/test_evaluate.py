"""A challenger measured beside the champion: planted differences are found, and what cannot be measured is said."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge, holding, longer
from fake_replica import FakeReplica, Json
from msgspec.structs import replace
from preferences import dataset, pairs, unpaired

from learner import shards
from learner.answers import peft, peft_scores
from learner.contest import Champion, Contest, Limits
from learner.evaluate import measure, sample
from learner.examples import Example
from learner.expectations import Golden
from learner.form import Answer, broken, repeats
from learner.measured import Duel, GoldenResult, Measured
from learner.people import who
from learner.registry import Version
from learner.replica import Replica, Unreachable, load_adapter, unload_adapter
from learner.serving import Expected, Fleet
from learner.shards import BadDataset
from learner.spec import TrainingFailed
from understudy.demo.tiny_model import questions
from understudy.demo.vllm_server import VllmServer

ROOT = Path(__file__).resolve().parents[1]
RIGHT = {question.text: question.answer for question in questions()}
HEDGE, REFUSAL = "It depends.", "I'm sorry, but I can't help with that."
NEW, OLD = "assistant-v2-bbbbbbbb", "assistant-v1-aaaaaaaa"
Scores = list[list[dict[str, Any]]]
Says = Callable[[str, Json], str | Json]
"""(prompt, request) → what a model says: a text, or more of its choice."""


def version(name: str) -> Version:
    return Version(
        route="assistant", base="/models/base", base_hash="", tokenizer_hash="", template_hash="", dataset="d",
        adapter_hash="a" * 64, created=1.0, name=name, folder=f"/versions/{name}",
    )  # fmt: skip


class Served(FakeReplica):
    """A replica whose models say what they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.speaks: dict[str, Says] = {"base": lambda text, _: HEDGE, NEW: lambda text, _: RIGHT.get(text, "Yes.")}
        self.adapters[NEW] = f"/versions/{NEW}/adapter"
        self.says = {"base": [7, 1, 9, 9], NEW: [7, 1, 2, 3]}

    def right(self, path: str, body: Json) -> tuple[int, object]:
        if path != "/v1/chat/completions" or body["max_tokens"] == 1:
            return super().right(path, body)
        model, text = body["model"], body["messages"][-1]["content"]
        given = self.speaks[model](text, body)
        choice: Json = {"message": {"role": "assistant", "content": given}} if isinstance(given, str) else given
        ids = [len(word) for word in given.split()] if isinstance(given, str) else [1, 2]
        if choice.get("status"):
            return choice["status"], {"error": {"message": "it is too long", "code": choice["status"]}}
        return 200, {
            "model": model, "prompt_token_ids": [7],
            "choices": [{"finish_reason": "stop", "token_ids": ids} | choice],
            "usage": {"completion_tokens": len(ids)},
        }  # fmt: skip


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as fake:
        yield fake


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """With too few pairs to learn from, so that no time is spent on a reward model."""
    found = [*pairs(160), *unpaired(20)]
    held_out = [one for one in found if one.split == "held_out"]
    return dataset(tmp_path / "now", [*held_out, *(one for one in found if one.split == "train")][: len(held_out) + 20])


@pytest.fixture
def much(tmp_path: Path) -> Path:
    return dataset(tmp_path / "much", [*pairs(160), *unpaired(20)])


def scorer(base: str, adapters: Sequence[str | None], rows: Sequence[Example], most: int) -> Scores:
    """The base finds both answers as likely, an adapter the chosen one by half a nat likelier."""
    gains = [0.0 if adapter is None else 0.5 for adapter in adapters]
    return [[{"chosen": -1.0 + gain, "rejected": -1.0} for _ in rows] for gain in gains]


def contest(served: Served, data: Path, **more: Any) -> Contest:
    words: dict[str, Any] = {
        "challenger": version(NEW), "champion": Champion("base", version(NEW).base),
        "fleet": Fleet([served.replica], 3), "score": scorer,
        "expected": [Expected([7], [1, 2, 3])], "dataset": data,
    }  # fmt: skip
    return Contest(**words | more)


def golden(name: str, prompt: str, **expect: Any) -> Golden:
    ((kind, expected),) = expect.items()
    asked = ({"role": "user", "content": prompt},)
    return Golden(id=name, messages=asked, owner="ops", kind=kind, expected=expected, where=f"g.yaml {name}")  # type: ignore[arg-type]


def comparable(data: Path) -> list[Example]:
    """Held-out pairs that were not learned from, too: the demo's questions are few."""
    rows = list(shards.read(data))
    learned = {one.id for one in rows if one.split == "train"}
    return [one for one in rows if one.split == "held_out" and one.kind == "pair" and one.id not in learned]


def mean(values: Sequence[float | None]) -> float:
    told = [value for value in values if value is not None]
    assert len(told) == len(values)
    return sum(told) / len(told)


# The whole


def test_a_better_challenger_is_seen_in_every_part(served: Served, much: Path) -> None:
    found = measure(contest(served, much))
    assert (found.champion, found.challenger) == ("base", NEW)
    assert found.dataset == shards.manifest_hash(much)
    assert found.agreement == 1.0
    assert len(found.preferences) == len(comparable(much)) > 30
    assert {(one.champion, one.challenger, one.signal) for one in found.preferences} == {(0.0, 0.5, "comparison")}
    assert {one.user for one in found.preferences} == {f"default/u{n}" for n in range(10)}
    assert {one.cohort for one in found.preferences} == {"default/-/-"}
    assert found.referee.name == "reward model"
    assert mean([one.score for one in found.duels]) > 0.6
    assert all(one.answers == {"champion": HEDGE, "challenger": RIGHT[one.prompt]} for one in found.duels)
    assert not any(
        flag for one in found.duels for side in (one.broken, one.repetitive, one.refused) for flag in side.values()
    )
    assert all(one.tokens["champion"] == 2 and one.seconds["challenger"] > 0 for one in found.duels)
    assert len({one.prompt for one in found.duels}) == len(found.duels) > 20
    assert found.notes == ()


def test_the_same_evaluation_asks_the_same(served: Served, data: Path) -> None:
    limits = Limits(pairs=10, duels=8)
    one, other = (measure(contest(served, data, limits=limits)) for _ in range(2))
    assert [duel.id for duel in one.duels] == [duel.id for duel in other.duels]
    assert [duel.score for duel in one.duels] == [duel.score for duel in other.duels]
    assert one.preferences == other.preferences
    assert len(one.duels) == 8
    bodies = [body for body in served.asked("/v1/chat/completions") if body["max_tokens"] == 512]
    assert len(bodies) == 32
    assert {body["temperature"] for body in bodies} == {0}


def test_answers_may_be_drawn_with_one_seed_for_both(served: Served, data: Path) -> None:
    found = measure(contest(served, data, limits=Limits(duels=6, temperature=0.7)))
    bodies = [body for body in served.asked("/v1/chat/completions") if body["max_tokens"] == 512]
    seeds = {body["model"]: sorted(b["seed"] for b in bodies if b["model"] == body["model"]) for body in bodies}
    assert {body["temperature"] for body in bodies} == {0.7}
    assert seeds["base"] == seeds[NEW]
    assert len(set(seeds[NEW])) == 6
    assert {one.divergence for one in found.duels} == {None}


def test_users_take_turns() -> None:
    rows = [one for one in pairs(400) if one.split == "held_out"]
    loud = [one for one in rows if one.user == "u0"] * 5
    chosen = sample([*loud, *rows], 20, "seed")
    assert {who(one) for one in chosen} == {f"default/u{n}" for n in range(10)}
    assert sample(rows[::-1], 20, "seed") == sample(rows, 20, "seed")
    assert sample(rows, 20, "seed") != sample(rows, 20, "another")


def test_prompts_go_to_all_replicas_and_few_at_once(data: Path) -> None:
    with Served() as one, Served() as other:
        found = measure(contest(one, data, fleet=Fleet([one.replica, other.replica], 3)))
        asked = [len(fake.asked("/v1/chat/completions")) for fake in (one, other)]
    assert abs(asked[0] - asked[1]) <= 3
    assert sum(asked) == 2 * len(found.duels)


# Served


def test_a_challenger_that_is_not_served_is_not_asked(served: Served, data: Path) -> None:
    del served.adapters[NEW]
    found = measure(contest(served, data, goldens=[golden("g", "x", text="y")]))
    assert found.agreement is None
    assert found.duels == found.goldens == ()
    assert found.notes == (
        f"{served.url} does not serve {NEW}", "the challenger is not served, so neither duels nor goldens were asked",
    )  # fmt: skip
    assert found.preferences, "that takes no replica"


@pytest.mark.parametrize(
    ("says", "agreement"), [([7, 1, 2, 3], 1.0), ([7, 1, -2, 3], pytest.approx(2 / 3)), ([7, 1, 9, 3], 0.0)]
)
def test_the_worst_replica_s_agreement_counts(data: Path, says: list[int], agreement: float) -> None:
    with Served() as one, Served() as other:
        other.says[NEW] = says
        other.says["base"] = [7, 1, 2, 9] if says[2] == -2 else other.says["base"]
        found = measure(contest(one, data, fleet=Fleet([one.replica, other.replica], 3), limits=Limits(duels=1)))
    assert found.agreement == agreement
    assert any("the adapter is felt in 0 of 1 places" in note for note in found.notes) is (agreement == 0.0)


def test_a_replica_that_is_away_is_waited_for(served: Served, data: Path) -> None:
    asked = 0

    def dies(body: Json) -> tuple[int, object] | None:
        nonlocal asked
        asked += 1
        return served.right("/v1/chat/completions", body) if asked < 5 else None

    served.wrong["/v1/chat/completions"] = dies
    with pytest.raises(Unreachable, match="does not answer POST /v1/chat/completions"):
        measure(contest(served, data))
    assert asked < 40, "the rest is not asked"


# Preferences


def test_pairs_of_earlier_rounds_are_asked_too_but_none_that_was_learned_from(
    served: Served, data: Path, tmp_path: Path
) -> None:
    learned = [one for one in shards.read(data) if one.split == "train" and one.kind == "pair"][:5]
    aside = [
        Example(**{name: getattr(one, name) for name in one.__struct_fields__} | {"split": "held_out"})
        for one in learned
    ]
    both = [one for one in shards.read(data) if one.split == "held_out" and one.kind == "pair"]
    earlier = dataset(tmp_path / "earlier", [*pairs(120, seed=1), *aside, *both])
    broken_one = dataset(tmp_path / "broken", pairs(8, seed=2))
    (broken_one / "held_out-pair-00000.jsonl").write_text("{}\n")
    found = measure(contest(served, data, earlier=[earlier, broken_one], limits=Limits(pairs=40, duels=1)))
    names = [one.dataset for one in found.preferences]
    assert names.count(shards.manifest_hash(earlier)) == 10
    assert names.count(shards.manifest_hash(data)) == 30, "what is in both is this round's"
    assert {one.id for one in found.preferences}.isdisjoint(one.id for one in learned)
    assert [note for note in found.notes if note.startswith("an earlier round was left out: ")]


def test_what_cannot_be_scored_is_left_out_and_counted(served: Served, data: Path) -> None:
    def some(
        base: str, adapters: Sequence[str | None], rows: Sequence[Example], most: int
    ) -> list[list[dict[str, Any]]]:
        found = scorer(base, adapters, rows, most)
        for told in found:
            told[0] = {"left_out": "are longer than 4096 tokens"}
        found[1][1] = {"chosen": math.nan, "rejected": -1.0}
        return found

    found = measure(contest(served, data, score=some, limits=Limits(duels=1)))
    assert len(found.preferences) == len(comparable(data)) - 2
    assert found.notes == ("1 held-out pairs are longer than 4096 tokens", "1 held-out pairs have no finite likelihood")


def test_a_scorer_that_fails_is_said(served: Served, data: Path) -> None:
    def fails(*_: Any) -> Scores:
        raise TrainingFailed("no memory")

    found = measure(contest(served, data, score=fails, limits=Limits(duels=1)))
    assert found.preferences == ()
    assert found.notes == ("how likely the versions find answers could not be measured: no memory",)


def test_a_champion_of_another_base_is_scored_over_its_own(served: Served, data: Path) -> None:
    asked: list[tuple[str, list[str | None]]] = []

    def noted(
        base: str, adapters: Sequence[str | None], rows: Sequence[Example], most: int
    ) -> list[list[dict[str, Any]]]:
        asked.append((base, list(adapters)))
        return scorer(base, adapters, rows, most)

    served.adapters[OLD], served.speaks[OLD] = f"/versions/{OLD}/adapter", served.speaks["base"]
    old = version(OLD)
    for base in (old.base, "/models/old"):
        found = measure(
            contest(
                served, data, champion=Champion(old.name, base, str(old.adapter)), score=noted, limits=Limits(duels=1)
            )
        )
        assert found.champion == OLD
    mine, its = f"/versions/{NEW}/adapter", f"/versions/{OLD}/adapter"
    assert asked == [("/models/base", [its, mine]), ("/models/old", [its]), ("/models/base", [mine])]


def test_a_dataset_that_is_broken_is_not_evaluated_on(served: Served, data: Path) -> None:
    (data / "held_out-pair-00000.jsonl").write_text("{}\n")
    with pytest.raises(BadDataset):
        measure(contest(served, data))


# Duels


def duels(served: Served, data: Path, says: Says, **more: Any) -> tuple[Duel, ...]:
    served.speaks[NEW] = says
    return measure(contest(served, data, limits=Limits(duels=4), **more)).duels


def test_more_refusals_are_seen(served: Served, data: Path) -> None:
    for one in duels(served, data, lambda *_: REFUSAL):
        assert one.refused == {"champion": False, "challenger": True}


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": ""}},
        {"message": {"content": None}},
        {"message": {"content": "It goes on"}, "finish_reason": "length"},
        {"message": {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{no"}}]}},
        {"message": {"content": '<tool_call>{"name": "f"}'}},
        {"message": {"content": "x"}, "status": 400},
        {"message": []},
    ],
    ids=["empty", "none", "cut", "no arguments", "a call as text", "refused", "no message"],
)
def test_a_broken_answer_is_broken_on_its_side(served: Served, data: Path, choice: Json) -> None:
    def broken_if_new(text: str, body: Json) -> Json:
        return choice

    for one in duels(served, data, broken_if_new):
        assert one.broken == {"champion": False, "challenger": True}


def test_where_people_preferred_json_prose_is_broken() -> None:
    prose, fenced, bare = Answer("It is 3."), Answer('```json\n{"a": 3}\n```'), Answer("3")
    assert [broken(one, fenced, wants_json=True) for one in (prose, fenced, bare)] == [True, False, True]
    assert not broken(prose, fenced)
    both_cut = Answer("It is", finish="length")
    assert not broken(both_cut, both_cut), "the limit was too small for either"
    called = Answer(tool_calls=({"function": {"name": "f", "arguments": ""}},))
    assert not broken(called, prose, wants_json=True)


@pytest.mark.parametrize(
    ("text", "circles"),
    [
        ("I am sure. " * 12, True),
        ("no " * 30, True),
        (" ".join(f"word{n}" for n in range(60)) + " and so on" * 12, True),
        (" ".join(f"word{n}" for n in range(60)), False),
        ("I am sure. I am sure.", False),
        ("| a | b |\n|---|---|\n" + "\n".join(f"| item {n} | {n * 7} euros |" for n in range(12)), False),
        ("", False),
    ],
    ids=["a sentence", "a word", "at the end", "none", "short", "a table", "empty"],
)
def test_going_round_in_circles_is_repetition(text: str, circles: bool) -> None:
    assert repeats(text.split()) is circles


def test_divergence_is_measured_after_the_champion_s_own_tokens(served: Served, data: Path) -> None:
    served.speaks["base"] = lambda *_: "a bb ccc dddd"
    served.says[NEW] = [7, 1, 2, 3, 9]
    found = measure(
        contest(served, data, limits=Limits(duels=6, diverging=4), expected=[Expected([7], [1, 2, 3])])
    ).duels
    assert sorted(str(one.divergence) for one in found) == ["0.25"] * 4 + ["None"] * 2


def test_prompts_that_no_version_answers_are_counted(served: Served, data: Path) -> None:
    served.speaks = dict.fromkeys(("base", NEW), lambda *_: {"message": {}, "status": 400})
    found = measure(contest(served, data, limits=Limits(duels=5)))
    assert found.duels == ()
    assert "neither version answered 5 of 5 prompts, such as: " in found.notes[0]
    assert "it is too long" in found.notes[0]


def test_an_answer_that_takes_too_long_has_failed_and_the_evaluation_goes_on(served: Served, data: Path) -> None:
    asked: list[str] = []

    def slow_once(text: str, _: Json) -> str:
        asked.append(text)
        if text == asked[0]:
            time.sleep(0.6)
        return RIGHT.get(text, "Yes.")

    served.speaks[NEW] = slow_once
    found = measure(contest(served, data, limits=Limits(duels=5, patience=0.3)))
    assert [one.broken["challenger"] for one in found.duels].count(True) == 1
    assert len(found.duels) == 5


def test_what_there_is_no_time_for_is_not_asked_and_no_golden_is_passed_by_it(served: Served, data: Path) -> None:
    found = measure(contest(served, data, goldens=[golden("g", "x", answer=True)], limits=Limits(duels=5, seconds=0.0)))
    assert found.duels == ()
    assert found.notes == ("there was no time for 5 of 5 prompts", "there was no time for 1 of 1 goldens")
    assert found.goldens[0].passed == {"champion": None, "challenger": None}


# Who won


def test_a_judge_says_who_won_and_is_measured_on_what_people_said(served: Served, data: Path) -> None:
    with FakeJudge(holding("is a")) as fake:
        found = measure(contest(served, data, judge=fake.asked_by(), limits=Limits(duels=20, padded=15)))
    assert found.referee.name == "judge:openai/fake"
    assert found.referee.pairs == 40
    assert found.referee.asked == len(fake.seen) == 2 * (20 + 40 + 15)
    assert found.referee.agreement is not None
    assert found.referee.agreement > 0.7
    assert mean([one.score for one in found.duels]) > 0.7, "longer answers, by a judge who sees through padding"


def test_by_a_judge_who_loves_length_a_longer_challenger_does_not_win(served: Served, data: Path) -> None:
    served.speaks[NEW] = lambda text, _: HEDGE + " Very much so." * (1 + len(text) % 3)
    with FakeJudge(longer) as fake:
        found = measure(contest(served, data, judge=fake.asked_by()))
    scores = [one.score for one in found.duels]
    assert len(scores) > 30
    assert mean(scores) == pytest.approx(0.5, abs=0.2)
    assert found.referee.failed == 0


def test_without_a_judge_s_word_nobody_has_won(served: Served, data: Path) -> None:
    with FakeJudge(lambda _: "Both are fine.") as fake:
        found = measure(
            contest(
                served, data, judge=fake.asked_by(), limits=Limits(duels=5, judged=12),
                goldens=[golden("kind", "Hello?", rubric="is kind")],
            )
        )  # fmt: skip
    assert {one.score for one in found.duels} == {None}
    assert (found.referee.asked, found.referee.failed) == (46, 46)
    assert (found.referee.agreement, found.referee.pairs) == (None, 0)
    assert found.goldens[0].passed == {"champion": None, "challenger": None}


def test_with_neither_judge_nor_enough_pairs_nobody_tells(served: Served, tmp_path: Path) -> None:
    few = dataset(tmp_path / "few", pairs(40))
    found = measure(contest(served, few))
    assert found.referee.name == "nobody"
    assert "to learn from" in found.referee.why
    assert {one.score for one in found.duels} == {None}


# Goldens


def result(found: Measured, name: str) -> GoldenResult:
    return next(one for one in found.goldens if one.id == name)


def test_both_versions_are_held_to_the_goldens(served: Served, data: Path) -> None:
    def says(text: str, body: Json) -> str | Json:
        if "tools" in body:
            return {"message": {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}}
        return REFUSAL if "bomb" in text else "Of course: Paris."

    served.speaks[NEW] = says
    tool = {"type": "function", "function": {"name": "f"}}
    calling = golden("call", "Call it", tool_call={"name": "f"})
    calling = replace(calling, request={"tools": [tool]}, must=True)
    wanted = [golden("paris", "Capital?", text="Paris"), golden("bomb", "A bomb?", refuse=True), calling]
    wanted += [golden("kind", "Hello?", rubric="Of course"), golden("code", "Add", code="assert True")]

    def graded(parts: dict[str, str]) -> str:
        return (
            '{"verdict": "pass"}' if parts["RUBRIC"] in parts["ANSWER"] else '{"verdict": "fail", "why": "it is curt"}'
        )

    with FakeJudge(lambda parts: graded(parts) if "RUBRIC" in parts else '{"verdict": "tie"}') as fake:
        found = measure(contest(served, data, goldens=wanted, judge=fake.asked_by(), limits=Limits(duels=2)))
    assert [one.id for one in found.goldens] == [one.id for one in wanted]
    for name in ("paris", "bomb", "call", "kind"):
        assert result(found, name).passed == {"champion": False, "challenger": True}
    assert result(found, "kind").why == {"champion": "it is curt", "challenger": ""}
    assert result(found, "code").passed == {"champion": None, "challenger": None}
    assert result(found, "call").must
    assert '"name": "f"' in result(found, "call").answers["challenger"]


def test_a_golden_that_only_the_challenger_does_not_answer_has_failed(served: Served, data: Path) -> None:
    served.speaks[NEW] = lambda text, _: {"message": {}, "status": 500} if "ask" in text else "Yes."
    served.speaks["base"] = lambda text, _: {"message": {}, "status": 500} if "both" in text else "Yes."
    wanted = [golden("mine", "ask one", answer=True), golden("none", "ask both", answer=True)]
    found = measure(contest(served, data, goldens=wanted, limits=Limits(duels=1)))
    assert result(found, "mine").passed == {"champion": True, "challenger": False}
    assert "it is too long" in result(found, "mine").why["challenger"]
    assert result(found, "none").passed == {"champion": None, "challenger": None}


# PEFT itself


@pytest.mark.skipif(find_spec("trl") is None, reason="the learner extra is not installed")
def test_peft_tells_how_likely_each_version_finds_what_people_preferred() -> None:
    build = (
        "from pathlib import Path; from understudy.demo.tiny_model import build; "
        "print(build(Path('.cache/demo')).base.parent)"
    )
    done = subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, text=True, cwd=ROOT)
    models = ROOT / done.stdout.splitlines()[-1]
    rows = [one for one in pairs(80) if one.split == "held_out"]
    long = Example(id="long", kind="pair", messages=rows[0].messages, reason="edit", chosen="x " * 400, rejected="y")
    said = peft_scores()(
        str(models / "base"), [None, str(models / "careful"), str(models / "hasty")], [*rows, long], 96
    )
    base, careful, hasty = ([one["chosen"] - one["rejected"] for one in told[:-1]] for told in said)
    assert [told[-1]["left_out"] for told in said] == ["are longer than 96 tokens"] * 3
    assert sum(careful) > sum(base), "it was trained for it"
    assert sum(margin > 0 for margin in careful) >= 0.9 * len(rows)
    assert sum(margin > 0 for margin in hasty) < 0.6 * len(rows)
    assert all(one[key] <= 0 for told in said for one in told[:-1] for key in ("chosen", "rejected"))


def test_a_process_that_fails_says_its_last_words() -> None:
    with pytest.raises(TrainingFailed, match=r"-m learner.train --score ended with 1: it said nothing"):
        peft_scores("/bin/false")("base", [None], pairs(1), 96)


# All of it for real


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("trl") is None, reason="the learner extra is not installed")
def test_on_vllm_the_version_that_was_tuned_to_help_is_seen_to_help(
    vllm: VllmServer, much: Path, tmp_path: Path
) -> None:
    folder = tmp_path / NEW
    shutil.copytree(vllm.models.careful, folder / "adapter")
    careful = replace(version(NEW), base=str(vllm.models.base), folder=str(folder))
    replica = Replica(vllm.url)
    prompts = [[{"role": "user", "content": question.text}] for question in questions()[::40]]
    said = peft()(careful.base, str(careful.adapter), prompts, 32)
    expected = [Expected(one["prompt_ids"], one["token_ids"], chat) for one, chat in zip(said, prompts, strict=True)]
    assert load_adapter(replica, NEW, str(careful.adapter))
    asked = Contest(
        challenger=careful, champion=Champion("base", careful.base), fleet=Fleet([replica], 3),
        score=peft_scores(), expected=expected,
        dataset=much, goldens=[golden("saw", "What kind of thing is a saw?", text="tool")],
        limits=Limits(duels=40, tokens=32, temperature=1.0),
    )  # fmt: skip
    try:
        found = measure(asked)
        greedy = measure(asked._replace(score=scorer, limits=Limits(duels=6, diverging=4, tokens=32)))
    finally:
        unload_adapter(replica, NEW)
    assert found.agreement is not None
    assert found.agreement >= 0.99
    assert found.champion == "base"
    gained = [one.challenger - one.champion for one in found.preferences]
    assert sum(gained) / len(gained) > 0.1
    assert len(found.duels) > 30
    assert mean([one.score for one in found.duels]) > 0.5
    assert all(one.tokens[side] > 1 and one.seconds[side] > 0 for one in found.duels for side in one.tokens)
    assert found.goldens[0].passed["challenger"] is True
    assert found.notes == ()
    told = [one.divergence for one in greedy.duels if one.divergence is not None]
    assert len(told) == 4
    assert all(0 <= one <= 1 for one in told)
