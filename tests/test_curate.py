"""What is kept of votes: who is heard, what is valid, what people agree on, and how much each counts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.agree import alpha, majority, pairwise_agreement
from learner.curate import Curated, curate, largest, shared_out
from learner.examples import Example, example_id
from learner.goldens import BadGoldens, Goldens, load
from learner.near import clusters, likeness, signature
from learner.pairs import Rules, Vote, harvest
from learner.people import People, who
from learner.plan import DatasetPolicy
from learner.refusals import refuses
from learner.split import divide, prompt_clusters
from learner.weigh import longer, weigh
from tests.conversations import START, asked, said

DATA = Path(__file__).parents[2] / "shared" / "data"
UNTIL = START + 10 * 86400.0


def example(
    prompt: str = "What is a carrot?",
    chosen: str | None = "A carrot is a vegetable.",
    rejected: str | None = "I am not sure about that at all.",
    *,
    user: str = "ann",
    kind: str = "pair",
    **more: Any,
) -> Example:
    messages = [{"role": "user", "content": prompt}]
    fields = {"reason": "comparison", "session": f"of {user}", "at": START} | more
    return Example(
        id=example_id(kind, messages, chosen, rejected),
        kind=kind,  # type: ignore[arg-type]
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        user=user,
        **fields,
    )


def votes(*examples: Example) -> list[Vote]:
    return [Vote(one, 1.0) for one in examples]


def curated(rows: list[Vote], people: People | None = None, **policy: Any) -> Curated:
    goldens = Goldens(policy.pop("golden_texts", ()))
    return curate(rows, people or People(), DatasetPolicy(**policy), goldens, UNTIL)


def dropped(found: Curated) -> dict[str, int]:
    return {one.filter: one.count for one in found.dropped if one.count}


# Who agrees


def test_a_majority_counts_weight_and_a_dead_heat_is_none() -> None:
    assert majority([("a", 1.0), ("b", 3.0)]) == ("b", 0.75)
    assert majority([("a", 1.0), ("b", 1.0)]) == (None, 0.5)
    assert majority([]) == (None, 0.0)


def test_alpha_is_krippendorffs() -> None:
    # His own worked example C (nominal, four observers, missing data): 0.743
    units = ["111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    assert alpha([list(unit) for unit in units]) == pytest.approx(0.743, abs=0.0005)
    assert alpha([["a", "a"], ["a", "a"]]) is None  # nothing to disagree on
    assert alpha([["a"], ["b"]]) is None
    assert alpha([["a", "b"], ["b", "a"]]) < 0  # type: ignore[operator]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the recorded judgements beside the project")
def test_recorded_judgements_become_pairs_where_annotators_agree_and_nothing_else() -> None:
    rows = json.loads((DATA / "judging" / "pandalm_first500.json").read_text())
    cast, expected = [], {}
    for row in rows:
        verdicts = [row[f"annotator{n}"] for n in (1, 2, 3)]
        prompt = f"{row['instruction']}\n{row['input']}\n#{row['idx']}"
        one, other = str(row["response1"]), str(row["response2"])
        most, count = Counter(verdicts).most_common(1)[0]
        if most and count >= 2 and one != other:
            expected[prompt] = (one, other) if most == 1 else (other, one)
        for judge, verdict in enumerate(verdicts):
            chosen, rejected = (other, one) if verdict == 2 else (one, other)
            made = example(prompt, chosen, rejected, user=f"annotator{judge}", session=f"{row['idx']}")
            cast.append(Vote(made, 1.0, tie=verdict == 0))
    found = curated(cast, most_alike=1.0)
    assert found.agreement == pytest.approx(
        pairwise_agreement([[row[f"annotator{n}"] for n in (1, 2, 3)] for row in rows]), abs=0.003
    )
    assert found.agreement == pytest.approx(0.92, abs=0.03)
    made = {one.messages[0]["content"]: (one.chosen, one.rejected) for one in found.examples}
    assert len(made) + dropped(found)["duplicate"] + dropped(found)["tie"] + dropped(found)["length"] / 3 == len(rows)
    assert found.alpha is not None
    assert 0.7 < found.alpha < found.agreement
    assert all(expected[prompt] == texts for prompt, texts in made.items())


def test_disagreement_below_the_policys_share_makes_no_pair() -> None:
    one = example()
    against = example(chosen=one.rejected, rejected=one.chosen, user="ben")
    agreeing = [example(user=f"u{n}") for n in range(2)]
    assert dropped(curated(votes(one, against))) == {"disputed": 1}
    found = curated(votes(one, against, *agreeing))
    assert [row.chosen for row in found.examples] == [one.chosen]
    assert len(curated(votes(one, against, *agreeing), min_agreement=0.9).examples) == 0


def test_a_tie_is_no_pair() -> None:
    assert dropped(curated([Vote(example(), 1.0, tie=True)])) == {"tie": 1}


def test_a_user_has_one_vote_on_an_item_and_words_count_before_deeds() -> None:
    early = example(at=START)
    late = example(chosen=early.rejected, rejected=early.chosen, at=START + 5)
    found = curated(votes(early, late))
    assert [row.chosen for row in found.examples] == [late.chosen]
    up = example(kind="unpaired", rejected=None, reason="thumb", at=START)
    down = example(kind="unpaired", chosen=None, rejected=up.chosen, reason="regenerate", at=START + 9)
    assert [row.chosen for row in curated(votes(up, down)).examples] == [up.chosen]


# What is valid


def test_votes_on_a_prompt_become_pairs_and_what_stays_alone_stays_single() -> None:
    liked = example(kind="unpaired", rejected=None, reason="thumb")
    disliked = example(kind="unpaired", chosen=None, reason="thumb", user="ben")
    alone = example("What is a potato?", "A potato is a root.", None, kind="unpaired", reason="rating", user="cat")
    found = curated(votes(liked, disliked, alone))
    assert {(row.kind, row.reason, row.chosen, row.rejected) for row in found.examples} == {
        ("pair", "votes", liked.chosen, disliked.rejected),
        ("unpaired", "rating", alone.chosen, None),
    }


def test_a_flagged_answer_and_a_liked_one_are_a_safety_pair() -> None:
    liked = example(kind="unpaired", rejected=None, reason="thumb")
    flagged = example(kind="unpaired", chosen=None, reason="flag", user="ben")
    assert [row.reason for row in curated(votes(liked, flagged)).examples] == ["flag"]


def test_answers_that_are_nearly_the_same_are_no_pair_but_still_a_correction() -> None:
    text = "The quick brown fox jumps over the lazy dog near the river bank every single morning."
    near = text.replace("single morning", "single day")
    found = curated(votes(example(chosen=near, rejected=text), example(kind="correction", chosen=near, rejected=None)))
    assert [row.kind for row in found.examples] == ["correction"]
    assert dropped(found) == {"alike": 1}
    same = example(chosen=f"**{text}**", rejected=text)
    assert curated(votes(same), most_alike=1.0).examples == []


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the recorded edits beside the project")
def test_every_professional_edit_is_a_correction_and_a_pair_but_for_the_near_identical() -> None:
    rows = [
        row for name in ("lamp_W3", "lamp_W12") for row in json.loads((DATA / "edits" / f"{name}.json").read_text())
    ]
    cast = []
    for n, row in enumerate(rows):
        answer = asked(row["instruction"], row["preedit"], user=f"writer{n}")
        edit = said("correction", answer, text=row["postedit"])
        cast += harvest([answer], [(0, edit)], Rules()).votes
    assert sum(vote.example.kind == "correction" for vote in cast) == len(rows)
    found = curated(cast)
    kinds = Counter(one.kind for one in found.examples)
    posts = {" ".join(row["postedit"].split()) for row in rows}
    assert all(" ".join((one.chosen or "").split()) in posts for one in found.examples)
    again = dropped(found).get("duplicate", 0)
    assert kinds["correction"] + again >= len(rows)
    assert kinds["pair"] + dropped(found)["alike"] + again >= len(rows)
    assert 5 <= dropped(found)["alike"] <= 15


@pytest.mark.parametrize(
    ("answer", "refusing"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I am not able to do that", True),
        ("You cannot help but notice the river.", False),
        ("Sorry for the delay! Here is the list.", False),
        ("To create a list, I can write a loop.", False),
    ],
)
def test_refusals_are_known_by_how_they_begin(answer: str, refusing: bool) -> None:
    assert refuses(answer) is refusing


def test_what_is_preferred_does_not_refuse_and_is_in_a_script_that_was_asked_in() -> None:
    refusal = example(chosen="I'm sorry, but I can't help with that.")
    foreign = example("Was ist das?", "это овощ, который растёт в земле", "Das ist Gemüse.")
    asked_for = example("Что это?", "это овощ, который растёт в земле", "No idea.", user="ben")
    found = curated(votes(refusal, foreign, asked_for))
    assert [row.id for row in found.examples] == [asked_for.id]
    assert dropped(found) == {"refusal": 1, "script": 1}


def test_answers_of_another_length_or_task_or_tenant_are_left_out() -> None:
    rows = votes(example(task_type="code"), example("another", tenant="other"), example("c", chosen="x" * 99))
    assert dropped(curated(rows, task_types=("code",))) == {"policy": 2}
    assert dropped(curated(rows, tenants=("other",))) == {"policy": 2}
    assert dropped(curated(rows, answer_chars=(1, 50))) == {"length": 1}


# Who is heard


def test_a_machine_is_not_heard() -> None:
    people = People()
    for n in range(60):
        people.add(said("thumb", asked("What?", "x", user="bot", at=n), 1.0))
        people.add(said("thumb", asked("What?", "x", user="ann", at=100.0 * n + n % 7), 1.0))
    assert people.machines(20.0) == {"default/bot"}
    found = curated(votes(example(user="bot"), example("another question", user="ann")), people)
    assert [row.user for row in found.examples] == ["ann"]


def test_a_crowd_of_new_users_for_one_item_is_not_heard() -> None:
    people = People()
    crowd = []
    for n in range(30):
        people.add(said("comparison", asked("Buy?", "x", user=f"new{n}", at=n), 1.0))
        crowd.append(example("Buy?", user=f"new{n}", at=START + n))
    found = curated(votes(*crowd), people)
    assert (found.examples, dropped(found)) == ([], {"burst": 30})


def test_trust_grows_with_age_and_agreement() -> None:
    people = People()
    people.add(asked("What?", "x", user="old"))
    people.add(asked("What?", "x", user="new", at=10 * 86400.0 - 60))
    old, new = (people.trust(f"default/{name}", UNTIL, {}) for name in ("old", "new"))
    assert old == 1.0
    assert new == pytest.approx(0.5, abs=0.01)
    assert people.trust("default/old", UNTIL, {"default/old": (10, 0)}) < 0.25


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.floats(0.005, 1.0))
def test_no_user_has_more_than_the_share(counts: list[int], share: float) -> None:
    most = largest(counts, share)
    total = sum(min(count, most) for count in counts)
    assert most >= 1
    assert most == 1 or most <= share * total + 1e-9


def test_a_loud_user_is_cut_to_the_share() -> None:
    rows = [example(f"question {n} about things", user=f"u{n}") for n in range(300)]
    rows += [example(f"loud question {n} of mine", user="loud") for n in range(40)]
    found = shared_out(Curated(), rows, DatasetPolicy())
    assert Counter(map(who, found))["default/loud"] == 3
    assert len(found) == 303


def test_synthetic_examples_are_a_fifth_at_most() -> None:
    rows = [example(f"question number {n}", user=f"u{n}", synthetic=n < 50) for n in range(100)]
    found = curated(votes(*rows), near_duplicate=1.0)
    assert sum(one.synthetic for one in found.examples) == 12  # of 62
    assert dropped(found) == {"synthetic": 38}


# Goldens


def test_goldens_are_kept_out_whole_reworded_a_little_or_inside_another_prompt() -> None:
    golden = "Explain in three sentences how a heat pump moves warmth from a cold garden into a warm house."
    denied = Goldens([golden])
    near = golden.replace("three sentences", "two sentences").upper()
    within = f"Hello there, I have some homework. {golden} Please be quick about it!"
    for text in (golden, f"  **{golden}**\n", near, within):
        assert denied.hold(example(text)), text
    assert not denied.hold(example("Explain in three sentences how a fridge works."))
    assert dropped(curated(votes(example(golden)), golden_texts=[golden])) == {"golden": 1}


def test_goldens_are_read_from_files_of_all_kinds_and_bad_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "first golden"}\n{"messages": [{"role": "user", "content": "2nd"}]}\n'
    )
    (tmp_path / "b.yaml").write_text("- {prompt: third golden, owner: someone}\n- fourth golden\n")
    found = load([tmp_path])
    assert len(found) == 4
    assert all(found.hold(example(text)) for text in ("First  golden!", "2nd", "third golden", "fourth golden"))
    assert found.digest() == load([tmp_path / "b.yaml", tmp_path / "a.jsonl"]).digest()
    (tmp_path / "c.yaml").write_text("- {owner: someone}\n")
    with pytest.raises(BadGoldens, match=r"c\.yaml has an entry without a prompt"):
        load([tmp_path])
    with pytest.raises(BadGoldens, match="neither a file nor a folder"):
        load([tmp_path / "none"])


# Near-duplicates


def test_signatures_estimate_how_alike_texts_are() -> None:
    chance = random.Random(3)
    words = [f"word{n}" for n in range(2000)]
    errors = []
    for changed in range(0, 60, 3):
        text = chance.choices(words, k=60)
        other = [chance.choice(words) if n < changed else word for n, word in enumerate(text)]
        a, b = ({" ".join(t)[n : n + 5] for n in range(len(" ".join(t)) - 4)} for t in (text, other))
        errors.append(likeness(signature(" ".join(text)), signature(" ".join(other))) - len(a & b) / len(a | b))
    assert abs(sum(errors) / len(errors)) < 0.03
    assert max(map(abs, errors)) < 0.2


def test_near_duplicates_are_one_example_unless_they_contradict() -> None:
    long = "Please tell me everything that you know about how carrots are grown in the garden of my aunt"
    one, near = example(long), example(f"{long}!", user="ben")
    found = curated(votes(one, near))
    assert (len(found.examples), dropped(found)) == (1, {"duplicate": 1})
    against = example(f"{long}?!", chosen=one.rejected, rejected=one.chosen, user="cat")
    assert dropped(curated(votes(one, against))) == {"duplicate": 1, "contradicted": 1}


def test_clusters_do_not_join_what_differs() -> None:
    texts = [f"What kind of thing is a {name}?" for name in ("carrot", "potato", "lorry")] * 2
    assert clusters([signature(text) for text in texts], 0.8) == [0, 1, 2, 0, 1, 2]


# The split


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), min_size=1, max_size=150), st.floats(0.05, 0.5))
def test_no_user_session_or_near_duplicate_is_on_both_sides(rows: list[tuple[int, int]], share: float) -> None:
    topics = ["".join(random.Random(n).choices("abcdefgh ijklmnop", k=60)) for n in range(13)]
    examples = [
        example(f"{topics[topic]} {place % 2 or ''}", f"answer {place}", user=f"u{user}")
        for place, (user, topic) in enumerate(rows)
    ]
    divided = divide(examples, share, "salt")
    assert len(divided.examples) + len(divided.left_out) == len(examples)
    places = prompt_clusters(divided.examples)
    for key in ([one.user for one in divided.examples], [one.session for one in divided.examples], places):
        sides: dict[Any, set[str]] = {}
        for name, one in zip(key, divided.examples, strict=True):
            sides.setdefault(name, set()).add(one.split)
        assert all(len(both) == 1 for both in sides.values())


def test_enough_is_held_out_even_where_everybody_asks_the_same() -> None:
    prompts = [f"{'abcdefghij'[n % 10] * 8} {n * 7919} {'qrstuvwxyz'[n // 10] * 8}" for n in range(80)]
    rows = [example(prompts[n % 80], f"answer {n}", user=f"u{n}") for n in range(1600)]
    divided = divide(rows, 0.1, "salt")
    held = sum(one.split == "held_out" for one in divided.examples)
    assert held >= 0.04 * len(rows)


def test_the_same_users_are_held_out_in_every_round() -> None:
    rows = [example(f"{n * 7919} apples {n}", user=f"u{n}") for n in range(200)]
    first = {one.user for one in divide(rows, 0.2, "salt").examples if one.split == "held_out"}
    second = {one.user for one in divide(rows[:100], 0.2, "salt").examples if one.split == "held_out"}
    assert second == first & {f"u{n}" for n in range(100)}
    assert 20 <= len(first) <= 60


# How much each counts


def test_quiet_cohorts_and_rare_tasks_count_more_and_weights_average_one() -> None:
    loud = [example(f"loud {n}", task_type="chat", country="DE") for n in range(90)]
    quiet = [example(f"quiet {n}", task_type="chat", country="FR") for n in range(10)]
    weights = {
        one.id: one.weight
        for one in weigh(
            [*loud, *quiet], Counter({("default", "chat", "DE"): 900, ("default", "chat", "FR"): 900}), 5.0
        )
    }
    ratio = weights[quiet[0].id] / weights[loud[0].id]
    assert ratio == pytest.approx(9.0, rel=0.01)
    assert sum(weights.values()) / 100 == pytest.approx(1.0, abs=1e-6)
    clipped = {
        one.id: one.weight
        for one in weigh(
            [*loud, *quiet], Counter({("default", "chat", "DE"): 100, ("default", "chat", "FR"): 9000}), 5.0
        )
    }
    assert clipped[quiet[0].id] / clipped[loud[0].id] == pytest.approx(25.0, rel=0.01)


def test_an_arm_that_was_seldom_drawn_counts_as_if_all_had_been_alike_up_to_the_clip() -> None:
    often, seldom, never = (example(f"prompt {p}", propensity=p) for p in (0.8, 0.2, 0.001))
    found = {one.propensity: one.weight for one in weigh([often, seldom, never], {}, 5.0)}
    assert found[0.2] / found[0.8] == pytest.approx(4.0)
    assert found[0.001] / found[0.2] == pytest.approx(1.0)


def test_longer_and_shorter_preferred_answers_have_the_same_weight() -> None:
    rows = [example(f"p{n}", "a long and winding answer to it all", "short one", user=f"u{n}") for n in range(60)]
    rows += [example(f"q{n}", "short", "a long and winding answer to it all", user=f"v{n}") for n in range(40)]
    sums = Counter[int]()
    for one in weigh(rows, {}, 5.0):
        sums[longer(one)] += one.weight  # type: ignore[assignment]
    assert sums[1] == pytest.approx(sums[-1], rel=0.01)
