"""What is kept of votes: who is heard, what is valid, what people agree on, and how much each counts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conversations import START, asked, said
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from learner.agree import alpha, majority, pairwise_agreement
from learner.curate import Curated, curate, largest, shared_out
from learner.examples import Example, example_id
from learner.goldens import BadGoldens, Goldens, load
from learner.near import clusters, likeness, signature
from learner.pairs import Rules, Vote, harvest
from learner.people import People, held_out_people, who
from learner.plan import DatasetPolicy
from learner.refusals import refuses
from learner.split import divide, prompt_clusters
from learner.weigh import longer, weigh

DATA = Path(__file__).parents[2] / "shared" / "data"
UNTIL = START + 10 * 86400.0
ASIDE = "nobody-29399"
"""A user whose hash comes before those of all others here."""


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
    fields = {"reason": "comparison", "session": f"of {user}", "at": START, "users": (f"default/{user}",)}
    fields |= {"events": (f"what {user} said of {chosen}",)} | more
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
    return [Vote(one, 1.0, signal=f"s{n}") for n, one in enumerate(examples)]


def curated(rows: list[Vote], people: People | None = None, **policy: Any) -> Curated:
    goldens = Goldens(policy.pop("golden_texts", ()))
    if "held_out" not in policy:  # somebody is, always: a user who does nothing else here
        aside = example("Who is held out?", kind="unpaired", rejected=None, reason="thumb", user=ASIDE)
        rows = [*rows, Vote(replace(aside, users=(who(aside),)), 1.0, signal="aside")]
        policy["held_out"] = 1e-6
    found = curate(rows, people or People(), DatasetPolicy(**policy), goldens, UNTIL)
    found.examples = [one for one in found.examples if one.user != ASIDE]
    return found


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
        ("Sorry, I can't discuss that.", True),
        ("I'm sorry to hear that. If you cannot log in, reset your password.", False),
        ("I can't help but admire the river.", False),
        ("I'm sorry for the delay! Your order can't be later than Friday.", False),
        ("I won't do more than sketch it.", False),
        ("To create a list, I can write a loop.", False),
    ],
)
def test_refusals_are_known_by_how_they_begin(answer: str, refusing: bool) -> None:
    assert refuses(answer) is refusing


def test_a_refusal_is_not_preferred_but_to_what_was_flagged() -> None:
    refusal = "I'm sorry, but I can't help with that."
    assert dropped(curated(votes(example(chosen=refusal)))) == {"refusal": 1}
    liked = example(chosen=refusal, kind="unpaired", rejected=None, reason="thumb")
    flagged = example(kind="unpaired", chosen=None, reason="flag", user="ben")
    assert [(row.kind, row.reason) for row in curated(votes(liked, flagged)).examples] == [("pair", "flag")]


def test_an_answer_in_another_script_is_not_preferred_to_one_in_the_prompts() -> None:
    foreign = example("Was ist das?", "это овощ, который растёт в земле", "Das ist ein Gemüse.")
    assert dropped(curated(votes(foreign))) == {"script": 1}
    asked_for = example("Что это?", "это овощ, который растёт в земле", "No idea.", user="ben")
    translated = example("Translate to Russian: good morning", "доброе утро", "спокойной ночи", user="cat")
    japanese = example("日本経済概要", "にほんのけいざいについて", "日本", user="dan")
    assert len(curated(votes(asked_for, translated, japanese)).examples) == 3


def test_answers_of_another_length_or_task_or_tenant_are_left_out() -> None:
    rows = votes(example(task_type="code"), example("another", tenant="other"), example("c", chosen="x" * 99))
    assert dropped(curated(rows, task_types=("code",), held_out=0.1)) == {"policy": 2}
    assert dropped(curated(rows, tenants=("other",), held_out=0.1)) == {"policy": 2}
    assert dropped(curated(rows, answer_chars=(1, 50))) == {"length": 1}


# Who is heard


def test_a_machine_is_not_heard() -> None:
    bot = [example(f"question {n} of the bot", user="bot", at=START + n) for n in range(60)]
    ann = [example(f"{n} others are asked", user="ann", at=START + 100.0 * n + n % 7) for n in range(60)]
    found = curated(votes(*bot, *ann), near_duplicate=1.0)
    assert {row.user for row in found.examples} == {"ann"}
    assert dropped(found)["machine"] == 60


def test_a_machine_without_a_name_is_known_by_its_session() -> None:
    rows = [example(f"question {n}", user="", session="one", at=START + n) for n in range(60)]
    assert dropped(curated(votes(*rows))) == {"machine": 60}


def test_somebody_who_votes_now_and_then_is_no_machine() -> None:
    people = People()
    people.hear(("default/ann", f"s{n}", START + 4.0 * n, True) for n in range(15))
    assert people.machines(20.0) == set()
    assert people.machines(0.5) == {"default/ann"}
    people.hear([("default/ben", "once", START, True)])
    assert people.machines(0.5) == {"default/ann"}


def test_a_crowd_of_new_users_for_one_item_is_not_heard() -> None:
    people = People()
    people.add(asked("Hello", "x", user="old", at=-90000.0))
    crowd = [example("Buy?", user=f"new{n}", at=START + n) for n in range(30)]
    found = curated(votes(*crowd, example("Buy?", user="old", at=START + 31)), people)
    assert (found.examples, dropped(found)) == ([], {"burst": 31})


def test_new_users_who_speak_for_what_others_speak_for_are_heard() -> None:
    crowd = [example("Buy?", user=f"new{n}", at=START + n) for n in range(30)]
    rest = [example(f"Question {n * 7919}?", f"answer {n * 31}", user=f"more{n}", at=START + n) for n in range(40)]
    assert "burst" not in dropped(curated(votes(*crowd, *rest)))


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


GOLDEN = "Explain in three sentences how a heat pump moves warmth from a cold garden into a warm house."


@pytest.mark.parametrize(
    "text",
    [
        GOLDEN,
        f"  **{GOLDEN}**\n",
        GOLDEN.replace("three sentences", "two sentences").upper(),
        GOLDEN.replace("warmth", "heat"),
        GOLDEN.replace("garden ", ""),
        GOLDEN.replace("sentences", "sentnces"),
        f"Hello there, I have some homework. {GOLDEN} Please be quick about it!",
        f"{GOLDEN}\n</think>\nx",
        f"{'other words come first ' * 500}{GOLDEN}",
        "Tell me why, please: what is entropy?",
        "请解释一下热泵的工作原理，谢谢",
    ],
)
def test_a_golden_is_kept_out_reworded_misspelt_or_inside_another_text(text: str) -> None:
    denied = Goldens([GOLDEN, "What is entropy?", "解释一下热泵的工作原理"])
    assert denied.hold(example(text))
    system = replace(example("Go on."), messages=[{"role": "system", "content": text}])
    assert denied.hold(system)
    assert dropped(curated(votes(example(GOLDEN)), golden_texts=[GOLDEN])) == {"golden": 1}


@pytest.mark.parametrize(
    "text",
    [
        "Explain in three sentences how a fridge works.",
        "What is enthalpy, and where would I meet it?",
        "How does a house stay warm in three cold months? A heat pump, a garden and sentences of warmth move from it.",
        "Yes!",
    ],
)
def test_what_only_sounds_like_a_golden_is_learned_from(text: str) -> None:
    assert not Goldens([GOLDEN, "What is entropy?"]).hold(example(text))


def test_one_short_turn_of_a_golden_conversation_denies_nothing(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Define entropy"}]},
        {"role": "user", "content": "yes"},
    ]
    (tmp_path / "g.json").write_text(json.dumps([{"messages": turns}, 1984]))
    found = load([tmp_path])
    assert not found.hold(example("Yes!"))
    assert found.hold(example("1984"))
    assert found.hold(replace(example("x"), messages=[{"role": "user", "content": "define entropy"}, turns[1]]))


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
    aside = held_out_people(map(who, examples), share, "salt")
    examples = [replace(one, split="held_out" if who(one) in aside else "train") for one in examples]
    divided = divide(examples, share)
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
    aside = held_out_people(map(who, rows), 0.1, "salt")
    divided = divide([replace(one, split="held_out" if who(one) in aside else "train") for one in rows], 0.1)
    held = sum(one.split == "held_out" for one in divided.examples)
    assert held >= 0.04 * len(rows)


def test_a_popular_prompt_or_a_template_does_not_empty_a_side() -> None:
    popular = [example("Hello", f"answer {n}", user=f"u{n % 300}") for n in range(600)]
    rest = [example(f"{n * 7919} questions about {n * 31} things", f"answer {n}", user=f"u{n}") for n in range(30)]
    template = "Answer as a patient teacher would, in three short sentences and without any jargon at all. "
    lessons = [example(f"{template * 3} What is {n * 7919}?", f"answer {n}", user=f"u{n % 40}") for n in range(120)]
    for rows, least in (([*popular, *rest], 500), (lessons, 90)):
        aside = held_out_people(map(who, rows), 0.1, "salt")
        divided = divide([replace(one, split="held_out" if who(one) in aside else "train") for one in rows], 0.1)
        assert sum(one.split == "train" for one in divided.examples) >= least
        assert sum(one.split == "held_out" for one in divided.examples) >= 1


def test_the_same_users_are_held_out_in_every_round() -> None:
    everybody = [f"u{n}" for n in range(200)]
    first, second = held_out_people(everybody, 0.2, "salt"), held_out_people(everybody[:100], 0.2, "salt")
    assert second == first & set(everybody[:100])
    assert 20 <= len(first) <= 60
    assert held_out_people(everybody, 0.2, "pepper") != first


def test_of_two_users_one_is_held_out_and_of_one_none() -> None:
    assert len(held_out_people(["ann", "ben"], 0.01, "salt")) == 1
    assert len(held_out_people(["ann", "ben"], 0.89, "salt")) == 1
    assert held_out_people(["ann"], 0.5, "salt") == set()


def test_no_example_is_made_of_votes_from_both_sides() -> None:
    rows: list[Vote] = []
    for n in range(120):
        liked = example(f"Question {n * 7919}?", kind="unpaired", rejected=None, reason="thumb", user=f"u{n}")
        disliked = example(f"Question {n * 7919}?", kind="unpaired", chosen=None, reason="thumb", user=f"u{n + 1}")
        same = example(f"Question {n * 7919}?", kind="unpaired", rejected=None, reason="thumb", user=f"u{n + 2}")
        rows += votes(*(replace(one, users=(who(one),)) for one in (liked, disliked, same)))
    found = curated(rows, held_out=0.3)
    sides: dict[str, set[str]] = {}
    for one in found.examples:
        for name in one.users:
            sides.setdefault(name, set()).add(one.split)
    assert {split for both in sides.values() for split in both} == {"train", "held_out"}
    assert all(len(both) == 1 for both in sides.values())


def test_a_vote_of_one_side_on_an_answer_of_the_other_is_left_out() -> None:
    rows = [Vote(example(f"{n * 7919} what?", user=f"u{n}"), 1.0, owners=(f"default/u{n + 1}",)) for n in range(60)]
    found = curated(rows, held_out=0.5)
    aside = held_out_people({f"default/u{n}" for n in range(61)}, 0.5, "understudy")
    mixed = sum((f"default/u{n}" in aside) != (f"default/u{n + 1}" in aside) for n in range(60))
    assert dropped(found)["between"] == mixed > 0


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


def test_instructions_that_differ_make_another_prompt() -> None:
    def told(how: str, one: Example) -> Example:
        messages = [{"role": "system", "content": how}, *one.messages]
        return replace(one, messages=messages, id=example_id(one.kind, messages, one.chosen, one.rejected))

    one = example()
    other = example(chosen=one.rejected, rejected=one.chosen, user="ben")
    found = curated(votes(told("Answer in English", one), told("Do not know", other)))
    assert len(found.examples) == 2


def test_what_people_found_equal_comes_back_as_no_pair() -> None:
    ties = [Vote(example(user=f"u{n}"), 1.0, tie=True) for n in range(5)]
    up = example(kind="unpaired", rejected=None, reason="thumb", user="ann")
    down = example(kind="unpaired", chosen=None, reason="thumb", user="ben")
    assert [row.kind for row in curated([*ties, *votes(up, down)]).examples] == ["unpaired", "unpaired"]


def test_few_people_teach_nothing_against_an_answer_that_more_prefer() -> None:
    right, hedge, wrong = "A carrot is a vegetable.", "I am not sure about that.", "A carrot is a kind of lorry."
    honest = [example(chosen=right, rejected=f"{hedge} {n * 7919}", user=f"u{n}") for n in range(3)]
    lone = example(chosen=wrong, rejected=right, user="loud")
    found = curated(votes(*honest, lone))
    assert dropped(found)["opposed"] == 1
    assert {one.chosen for one in found.examples} == {right}
    joined = [example(chosen=wrong, rejected=right, user=f"v{n}") for n in range(6)]
    assert wrong in {one.chosen for one in curated(votes(*honest, *joined)).examples}


def test_many_votes_on_one_prompt_cost_little() -> None:
    texts = [f"{n * 7919}" for n in range(4000)]
    cast = [example(chosen=text, kind="unpaired", rejected=None, reason="thumb", user=text) for text in texts[::2]]
    cast += [example(chosen=None, rejected=text, kind="unpaired", reason="thumb", user=text) for text in texts[1::2]]
    assert sum(row.kind == "pair" for row in curated(votes(*cast)).examples) == 4


def test_longer_and_shorter_preferred_answers_have_the_same_weight() -> None:
    rows = [example(f"p{n}", "a long and winding answer to it all", "short one", user=f"u{n}") for n in range(60)]
    rows += [
        example(f"q{n}", "short", "a long and winding answer to it all", user=f"v{n}", weight=3.0) for n in range(20)
    ]
    sums = Counter[int]()
    for one in weigh(rows, {}, 5.0):
        sums[longer(one)] += one.weight  # type: ignore[assignment]
    assert sums[1] == pytest.approx(sums[-1], rel=0.01)
