"""From votes to the examples of a dataset: who is heard, what is valid, what people agree on. Pure.

Reads top to bottom as `curate`. Each filter counts what it dropped and keeps a few of them to show.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import msgspec

from learner.agree import alpha, majority, pairwise_agreement
from learner.examples import SPLITS, Example, Split, example_id
from learner.goldens import Goldens
from learner.near import Signature, clusters, signature
from learner.pairs import Vote
from learner.people import People, agreement_of, held_out_people, who
from learner.plan import DatasetPolicy
from learner.refusals import refuses
from telemetry.wording import CAP, canonical, grams, likeness

SHOWN = 3
"""Dropped examples that are kept of each filter."""
SAID = frozenset(["thumb", "rating", "comparison", "flag", "correction", "edit"])
INSTRUCTING = ("system", "developer")
FEW = 2
"""People whose word an example may depend on; what more say depends on none of them."""
FAIR = 3
"""Where there are few users, one may give this many times an equal share."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What one filter dropped."""

    filter: str
    meaning: str
    count: int
    examples: tuple[Example, ...]


@dataclass(slots=True)
class Curated:
    """What is left, and what went."""

    examples: list[Example] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    alpha: float | None = None
    """Krippendorff's α over items that several people voted on."""
    agreement: float | None = None
    """Share of pairs of votes on one item that are equal."""
    votes: int = 0

    def keep(self, name: str, meaning: str, rows: list[Any], good: Callable[[Any], bool]) -> list[Any]:
        """The `rows` (votes or examples) that are good; the others are counted under the filter's name."""
        kept: list[Any] = []
        bad: list[Any] = []
        for row in rows:
            (kept if good(row) else bad).append(row)
        self.drop(name, meaning, bad)
        return kept

    def drop(self, name: str, meaning: str, rows: Sequence[Any]) -> None:
        examples = (row.example if isinstance(row, Vote) else row for row in rows[:SHOWN])
        self.dropped.append(Dropped(name, meaning, len(rows), tuple(examples)))


def curate(votes: Iterable[Vote], people: People, policy: DatasetPolicy, goldens: Goldens, until: float) -> Curated:
    """The examples that the policy keeps of `votes`, in the order of their ids; weights as people's word counts.

    Those whose people are held out and the others are made apart, so that no example has both. `until`: the dataset's
    own present, Unix seconds.
    """
    found = Curated()
    rows = sorted(votes, key=lambda vote: (vote.example.id, vote.example.at, vote.example.events))
    found.votes = len(rows)
    people.hear((who(vote.example), vote.signal, vote.example.at, vote.verified) for vote in rows)
    rows = found.keep("policy", "of another tenant or task type", rows, lambda vote: _asked_for(vote.example, policy))
    machines = people.machines(policy.votes_per_minute)
    rows = found.keep("machine", "its user is a machine", rows, lambda vote: who(vote.example) not in machines)
    rows = found.keep("golden", "its prompt is for evaluation", rows, lambda vote: not goldens.hold(vote.example))
    rows = found.keep("length", "too short or too long", rows, lambda vote: _fits(vote.example, policy))
    rows = _one_vote_each(found, rows)
    rows = _without_bursts(found, rows, people)
    aside = held_out_people((name for vote in rows for name in _people(vote)), policy.held_out, policy.salt)
    rows = found.keep(
        "between", "its people are on both sides of the split", rows, lambda vote: not _mixed(vote, aside)
    )
    examples = _settled(found, rows, people, policy, until, aside)
    examples = _not_alone(found, examples, policy)
    examples = found.keep("refusal", "what was preferred refuses", examples, _does_not_refuse)
    examples = found.keep("script", "what was preferred is in another script", examples, _same_script)
    examples = found.keep("alike", "its two answers are nearly the same", examples, lambda one: _differs(one, policy))
    examples = _one_of_each(found, examples, policy)
    examples = _synthetic(found, examples, policy)
    found.examples = sorted(examples, key=lambda example: example.id)
    return found


def _people(vote: Vote) -> tuple[str, ...]:
    return (who(vote.example), *vote.owners)


def _mixed(vote: Vote, aside: Collection[str]) -> bool:
    return len({name in aside for name in _people(vote)}) > 1


def _asked_for(example: Example, policy: DatasetPolicy) -> bool:
    return (not policy.tenants or example.tenant in policy.tenants) and (
        not policy.task_types or example.task_type in policy.task_types
    )


def _fits(example: Example, policy: DatasetPolicy) -> bool:
    shortest, longest = policy.answer_chars
    asked = sum(len(str(turn.get("content", ""))) for turn in example.messages)
    return asked <= policy.prompt_chars and all(shortest <= len(text) <= longest for text in example.texts)


def _does_not_refuse(example: Example) -> bool:
    """A refusal may be preferred to what was flagged, and where a user wrote it."""
    deliberate = example.reason in ("flag", "correction", "edit")
    return deliberate or not refuses(example.chosen or "")


def _same_script(example: Example) -> bool:
    """Not preferred over an answer in the prompt's script, while it is in none of the prompt's itself."""
    if example.kind != "pair" or example.reason in ("correction", "edit"):
        return True
    asked_in = {script for turn in example.messages for script in _scripts(str(turn.get("content", "")))}
    good, bad = (_main_script(text) for text in example.texts)
    return good in asked_in or bad not in asked_in


def _main_script(text: str) -> str:
    scripts = _scripts(text)
    return max(sorted(scripts), key=lambda script: scripts[script], default="LATIN")


def _scripts(text: str) -> dict[str, int]:
    """Letters by script, as far as Unicode's names tell: LATIN, CYRILLIC, CJK, …; what Japanese mixes is one."""
    found: dict[str, int] = {}
    if text.isascii():
        return {"LATIN": 1}
    for letter in text[:500]:
        if letter.isalpha():
            script = "LATIN" if letter.isascii() else unicodedata.name(letter, "?").partition(" ")[0]
            script = "CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script
            found[script] = found.get(script, 0) + 1
    return found


def _item(example: Example) -> Hashable:
    """What a vote is on: a prompt with one answer, or with two in no order."""
    texts = frozenset(example.texts)
    return example.kind, example.tenant, msgspec.json.encode(example.messages), texts


def _value(vote: Vote) -> int | None:
    """What it says of its item: which of its texts (in the alphabet's order) is good, -1 for none; None for a tie."""
    chosen = vote.example.chosen
    return None if vote.tie else -1 if chosen is None else sorted(vote.example.texts).index(chosen)


def _one_vote_each(found: Curated, votes: list[Vote]) -> list[Vote]:
    """Of each user and item the last vote; what is said counts before what is only done."""
    last: dict[Hashable, Vote] = {}
    for vote in sorted(votes, key=lambda vote: (vote.example.reason in SAID, vote.example.at, vote.example.id)):
        last[who(vote.example), _item(vote.example)] = vote
    standing = {id(vote) for vote in last.values()}
    return found.keep(
        "again", "its user said something else about it, or the same again", votes, lambda vote: id(vote) in standing
    )


def _by_item(votes: Iterable[Vote]) -> dict[Hashable, list[Vote]]:
    found: dict[Hashable, list[Vote]] = {}
    for vote in votes:
        found.setdefault(_item(vote.example), []).append(vote)
    return found


def _without_bursts(found: Curated, votes: list[Vote], people: People) -> list[Vote]:
    bad = {
        item
        for item, about in _by_item(votes).items()
        if people.is_burst((who(vote.example), vote.example.at) for vote in about)
    }
    return found.keep("burst", "a crowd of new users came for it", votes, lambda vote: _item(vote.example) not in bad)


def _settled(
    found: Curated, votes: list[Vote], people: People, policy: DatasetPolicy, until: float, aside: Collection[str]
) -> list[Example]:
    """One example of each item and side, as most of the weight has it; weighed by the votes for it."""
    said = [[(who(vote.example), _value(vote)) for vote in about] for about in _by_item(votes).values()]
    agreed = agreement_of(said)
    found.alpha = alpha([value for _, value in item] for item in said)
    found.agreement = pairwise_agreement([value for _, value in item] for item in said)
    ties: list[Vote] = []
    disputed: list[Vote] = []
    sides: dict[Split, list[Example]] = {"train": [], "held_out": []}
    judged: set[Hashable] = set()
    for about in _by_item(votes).values():
        weights = [max(1e-6, vote.strength * people.trust(who(vote.example), until, agreed)) for vote in about]
        value, share = majority(zip(map(_value, about), weights, strict=True))
        judged.add(_texts_of(about[0].example))
        if len(about) > 1 and (share < policy.min_agreement or (value is None and share <= 0.5)):
            disputed.append(about[0])
        elif value is None:
            ties.append(about[0])
        else:
            for split, own in sides.items():  # all have their say, and each side learns from its own people's votes
                winning = [
                    (vote.example, weight)
                    for vote, weight in zip(about, weights, strict=True)
                    if _value(vote) == value and (who(vote.example) in aside) == (split == "held_out")
                ]
                own += [_merged(winning, split)] if winning else []
    found.drop("disputed", f"less than {policy.min_agreement:g} of the votes on it agree", disputed)
    found.drop("tie", "neither answer is better", ties)
    return [one for own in sides.values() for one in _with_pairs(own, judged, policy)]


def _merged(rows: Sequence[tuple[Example, float]], split: Split) -> Example:
    """Equal examples, (example, weight), as one: of the heaviest's user, with all events; two people count as 1.6."""
    ordered = sorted(rows, key=lambda row: (-row[1], row[0].at, row[0].events))
    return msgspec.structs.replace(
        ordered[0][0],
        split=split,
        weight=sum(weight * 0.6**place for place, (_, weight) in enumerate(ordered)),
        users=tuple(sorted({user for one, _ in rows for user in one.users})),
        events=tuple(sorted({event for one, _ in rows for event in one.events})),
        at=max(one.at for one, _ in rows),
        text_from=min(one.text_from for one, _ in rows),
    )


def _not_alone(found: Curated, examples: list[Example], policy: DatasetPolicy) -> list[Example]:
    """Without what few hold against an answer that more people preferred to some other one.

    Nobody else may have judged just these two answers. So one user could teach anything against answers that everybody
    likes, by answers that nobody else saw.
    """
    liked: dict[Hashable, set[str]] = {}
    for one in examples:
        if one.chosen is not None:
            liked.setdefault(_said(one, one.chosen), set()).update(one.users)
    opposed: set[tuple[str, ...]] = set()
    for one in examples:
        if one.kind == "pair" and one.chosen is not None and one.rejected is not None:
            with_it = liked[_said(one, one.chosen)]
            against = liked.get(_said(one, one.rejected), set()) - with_it
            if against and len(with_it) < policy.min_agreement * len(with_it | against):
                opposed.add(one.events)
    meaning = "it holds for worse what more people preferred"
    return found.keep("opposed", meaning, examples, lambda one: one.kind == "unpaired" or one.events not in opposed)


def _said(example: Example, text: str) -> Hashable:
    return example.tenant, example.split, msgspec.json.encode(example.messages), text


def _texts_of(example: Example) -> Hashable:
    """The pair of answers that was judged, whoever won."""
    return example.tenant, msgspec.json.encode(example.messages), frozenset(example.texts)


def _with_pairs(examples: Sequence[Example], judged: Collection[Hashable], policy: DatasetPolicy) -> list[Example]:
    """Single votes as pairs, where an answer to the same prompt was liked and another one was not.

    Not where people compared the two themselves (`judged`), whatever came of it.
    """
    prompts: dict[Hashable, list[Example]] = {}
    for example in examples:
        if example.kind == "unpaired":
            prompts.setdefault((example.tenant, msgspec.json.encode(example.messages)), []).append(example)
    pairs: list[Example] = []
    spent: set[str] = set()
    for about in prompts.values():
        good = sorted((one for one in about if one.chosen), key=lambda one: (-one.weight, one.id))
        bad = sorted((one for one in about if one.rejected), key=lambda one: (-one.weight, one.id))
        made = 0
        for one, other in _heaviest(good, bad, policy.pairs_per_prompt):
            pair = _pair(one, other)
            if made < policy.pairs_per_prompt and _texts_of(pair) not in judged:
                pairs.append(pair)
                spent |= {one.id, other.id}
                made += 1
    return [*(example for example in examples if example.id not in spent), *pairs]


def _heaviest(good: Sequence[Example], bad: Sequence[Example], wanted: int) -> list[tuple[Example, Example]]:
    """Pairs by falling product of weights; both lists fall already, so the heaviest are at their beginnings."""
    most = 4 * wanted
    both = [(one, other) for one, other in product(good[:most], bad[:most])]
    return sorted(both, key=lambda row: (-row[0].weight * row[1].weight, row[0].id, row[1].id))


def _pair(good: Example, bad: Example) -> Example:
    later = max(good, bad, key=lambda one: (one.at, one.id))
    chosen, rejected = good.chosen, bad.rejected
    return msgspec.structs.replace(
        later,
        id=example_id("pair", later.messages, chosen, rejected),
        kind="pair",
        reason="flag" if bad.reason == "flag" else "votes",
        chosen=chosen,
        rejected=rejected,
        weight=(good.weight * bad.weight) ** 0.5,
        users=tuple(sorted({*good.users, *bad.users})),
        events=tuple(sorted({*good.events, *bad.events})),
        text_from=min(good.text_from, bad.text_from),
        arms=(*good.arms, *bad.arms),
        propensity=min(good.propensity, bad.propensity),
        synthetic=good.synthetic or bad.synthetic,
    )


def _differs(example: Example, policy: DatasetPolicy) -> bool:
    """Pairs that are nearly the same lower the likelihood of both answers (arXiv 2410.08847)."""
    if example.kind != "pair":
        return True
    if example.chosen == example.rejected:
        return False
    return any(
        one != other and likeness(grams(one), grams(other)) < policy.most_alike
        for one, other in zip(_pieces(example.chosen), _pieces(example.rejected), strict=False)
    )


def _pieces(text: str | None) -> list[str]:
    """A text in canonical form, in pieces as long as texts are compared; twelve at most."""
    return [canonical((text or "")[at : at + CAP]) for at in range(0, min(len(text or ""), 12 * CAP), CAP)]


def _one_of_each(found: Curated, examples: list[Example], policy: DatasetPolicy) -> list[Example]:
    """Of near-duplicates, in prompt and in answers, the heaviest; none where they contradict each other."""
    signed = Signatures()
    prompts = signed.clusters((asked(one) for one in examples), policy.near_duplicate)
    answers = signed.clusters((text for one in examples for text in one.texts), policy.near_duplicate)
    groups: dict[Hashable, list[Example]] = {}
    for one in sorted(examples, key=lambda one: (-one.weight, one.id)):
        said = frozenset(answers[text] for text in one.texts)
        told_apart = len(said) == len(one.texts)
        told = one.kind, one.split, told_apart or one.id, instructions(one)
        groups.setdefault((told, prompts[asked(one)], said), []).append(one)
    kept: list[Example] = []
    again: list[Example] = []
    disputed: list[Example] = []
    for group in groups.values():
        first, *others = group
        for_it = sum(one.weight for one in group if _side(one, answers) == _side(first, answers))
        share = for_it / sum(one.weight for one in group)
        (kept if share >= policy.min_agreement else disputed).append(first)
        again += others
    found.drop("duplicate", "another example is nearly the same", again)
    found.drop("contradicted", "a near-duplicate says the opposite", disputed)
    return kept


def _side(example: Example, answers: Mapping[str, int]) -> int | None:
    """Which of its answers is the good one."""
    return answers[example.chosen] if example.chosen is not None else None


class Signatures:
    """Signatures of texts, each made once."""

    def __init__(self) -> None:
        self._made: dict[str, Signature] = {}

    def clusters(self, texts: Iterable[str], threshold: float) -> dict[str, int]:
        """By text the number of its cluster of near-duplicates; the same numbers in whatever order they come."""
        ordered = sorted(set(texts))
        return dict(zip(ordered, clusters([self._of(text) for text in ordered], threshold), strict=True))

    def _of(self, text: str) -> Signature:
        made = self._made.get(text)
        if made is None:
            made = self._made[text] = signature(text)
        return made


def asked(example: Example) -> str:
    """The prompt as one text, without instructions: many conversations share these."""
    turns = (str(turn.get("content", "")) for turn in example.messages if turn["role"] not in INSTRUCTING)
    return "\n".join(turns)


def instructions(example: Example) -> str:
    """What is not part of the conversation."""
    return "\n".join(str(turn.get("content", "")) for turn in example.messages if turn["role"] in INSTRUCTING)


def _synthetic(found: Curated, examples: list[Example], policy: DatasetPolicy) -> list[Example]:
    """At most the policy's share of examples that no user gave, the heaviest of them."""
    real = sum(not one.synthetic for one in examples)
    share = policy.synthetic_share
    most = int(real * share / (1 - share)) if share < 1 else len(examples)
    made = sorted((one for one in examples if one.synthetic), key=lambda one: (-one.weight, one.id))
    beyond = {one.id for one in made[most:]}
    return found.keep("synthetic", f"beyond a share of {share:g}", examples, lambda one: one.id not in beyond)


def shared_out(found: Curated, examples: Sequence[Example], policy: DatasetPolicy) -> list[Example]:
    """At most the policy's share of each split from one user, the heaviest examples.

    Where users are few, one may give up to `FAIR` equal shares.
    """
    beyond: set[str] = set()
    for split in SPLITS:
        by_user: dict[str, list[Example]] = {}
        for one in sorted(examples, key=lambda one: (-one.weight, one.id)):
            for name in (one.users or (who(one),)) if one.split == split and len(one.users) <= FEW else ():
                by_user.setdefault(name, []).append(one)
        share = max(policy.user_share, min(1.0, FAIR / max(1, len(by_user))))
        rest = sum(one.split == split for one in examples)
        most, gone = largest(list(map(len, by_user.values())), share), set[str]()
        while True:  # an example of two people goes with the one who has too many
            gone = {one.id for own in by_user.values() for one in own[most:]}
            fair = max(1, int(share * (rest - len(gone))))
            if most <= fair:
                break
            most = fair
        beyond |= gone
    meaning = f"beyond a share of {policy.user_share:g} of one user"
    return found.keep("user", meaning, list(examples), lambda one: one.id not in beyond)


def largest(counts: Sequence[int], share: float) -> int:
    """How many each may keep so that nobody has more than `share` of what all keep; 1 at least."""
    most = max(counts, default=0)
    while most > 1 and most > share * sum(min(count, most) for count in counts):
        most = max(1, min(most - 1, int(share * sum(min(count, most) for count in counts))))
    return most


def coverage(examples: Iterable[Example]) -> Mapping[str, int]:
    """Examples by task type."""
    found: dict[str, int] = {}
    for example in examples:
        name = example.task_type or "(none)"
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))
