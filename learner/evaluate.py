"""A challenger beside the champion, measured before any user meets it: `learner.gate` decides on what is found here.

    agreement     each replica says with the challenger what PEFT says, token by token (`learner.serving`)
    preferences   how much likelier each version finds the answer that people preferred, on held-out pairs of this
                  round and of earlier ones
    duels         both versions' answers to held-out prompts, from the replicas, greedy unless told otherwise; who wins
                  says a judge or, without one, a model of what people prefer; besides: refusals, form, repetition,
                  tokens, seconds, divergence
    goldens       whether both versions' answers are what their owners expect (`learner.expectations`)

Likelihoods come from PEFT and not from vLLM's `prompt_logprobs`, whose first use compiles for 20 s while users wait.
What is served is what PEFT says: that was compared before, token by token.

Which items are looked at follows from the dataset's hash: users take turns, so that many are heard. The same
evaluation asks the same. Whatever could not be measured is in `notes`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from learner import reward_model
from learner.contest import SIDES, Contest, Limits, both, each, hash_bit
from learner.examples import Example
from learner.expectations import Golden, check, prompt_text
from learner.form import Pair, broken, is_json, repeats
from learner.isolated import Verdict
from learner.judge import Compared, calibrate
from learner.measured import Duel, GoldenResult, Measured, Preference, Referee
from learner.people import cohort, who
from learner.refusals import refuses
from learner.replica import Replica, ServingFailed, Unreachable, listing, serves
from learner.reward_model import people_prefer
from learner.score import at_equal_length, padded
from learner.serving import Expected, agreement, forced
from learner.shards import BadDataset, dataset_name, read
from learner.spec import TrainingFailed

DIVERGING_TOKENS = 64
MOST_DRAWS = 4


def measure(contest: Contest) -> Measured:
    """All of it. Raises Unreachable, BadDataset (this round's), NoLitellm."""
    if contest.judge is not None:
        contest.judge.ready()
    notes: list[str] = []
    seed = dataset_name(contest.dataset)
    examples = list(read(contest.dataset))
    champion_there(contest)
    share = agreed(contest, notes)
    found = preferences(contest, examples, notes)
    duels: list[Duel] = []
    told: list[GoldenResult] = []
    if share is None:
        notes.append("the challenger is not served, so neither duels nor goldens were asked")
    else:
        until = time.monotonic() + contest.limits.seconds
        duels, referee = judged(contest, asked(contest, examples, seed, until, notes), examples, seed)
        told = golden_results(contest, until, notes)
        champion_there(contest)
        if contest.judge is not None:
            referee = replace(referee, asked=contest.judge.asked, failed=contest.judge.failed)
    return Measured(
        champion=contest.champion.model,
        challenger=contest.challenger.name,
        dataset=seed,
        agreement=share,
        preferences=tuple(found),
        duels=tuple(duels),
        goldens=tuple(told),
        referee=referee if share is not None else Referee(name="nobody", why="there were no duels"),
        notes=tuple(notes),
    )


def champion_there(contest: Contest) -> None:
    """Raises Unreachable where a replica lacks the champion: what it does not serve would seem to have lost."""
    for replica in contest.fleet.replicas:
        has = listing(replica)
        if contest.champion.model not in (has.base, *has.adapters):
            raise Unreachable(f"{replica.url} does not serve the champion {contest.champion.model}; load it first")


def agreed(contest: Contest, notes: list[str]) -> float | None:
    """The worst replica's share of PEFT's tokens; 0 where it reads other prompts or does not apply the adapter."""
    version, shares = contest.challenger, []
    for replica in contest.fleet.replicas:
        if not serves(replica, version.name, contest.fleet.path(version)):
            notes.append(f"{replica.url} does not serve {version.name}")
            return None
        if contest.agreement is not None:
            shares.append(contest.agreement)
            continue
        found = agreement(replica, version.name, contest.expected)
        if not found.apart:
            notes.append(f"{replica.url}: {found.touched}")
        elif not found.holds(0.0):
            notes.append(
                f"{replica.url} reads {found.prompts_equal} of {found.prompts} prompts as PEFT does, and the adapter "
                f"is felt in {found.telling_equal} of {found.telling} places"
            )
        shares.append(found.share if found.holds(0.0) else 0.0)
    return min(shares)


# Preferences


def preferences(contest: Contest, examples: Sequence[Example], notes: list[str]) -> list[Preference]:
    """Margins of both versions on held-out pairs."""
    pairs = _held_out_pairs(contest, examples, notes)
    if not pairs:
        notes.append("there are no held-out pairs")
        return []
    try:
        champions, challengers = _margins(contest, [one for _, one in pairs])
    except TrainingFailed as error:
        notes.append(f"how likely the versions find answers could not be measured: {error}")
        return []
    found, left_out = [], Counter[str]()
    for (name, one), champion, challenger in zip(pairs, champions, challengers, strict=True):
        if isinstance(champion, str) or isinstance(challenger, str):
            left_out[champion if isinstance(champion, str) else str(challenger)] += 1
            continue
        found.append(
            Preference(
                id=one.id, user=who(one), signal=one.reason, cohort=cohort_name(one), dataset=name,
                champion=champion, challenger=challenger,
            )
        )  # fmt: skip
    notes.extend(f"{count} held-out pairs {why}" for why, count in sorted(left_out.items()))
    return found


def _held_out_pairs(contest: Contest, examples: Sequence[Example], notes: list[str]) -> list[tuple[str, Example]]:
    """With their datasets' names: half of them from earlier rounds, if there are any; none that was learned from.

    Rounds overlap: what is in this round's dataset, too, is this round's.
    """
    most, name = contest.limits.pairs, dataset_name(contest.dataset)
    learned, seen = {one.id for one in examples if one.split == "train"}, {one.id for one in examples}
    found: list[tuple[str, Example]] = []
    for folder in contest.earlier:
        try:
            rows, earlier = list(read(folder)), dataset_name(folder)
        except BadDataset as error:
            notes.append(f"an earlier round was left out: {error}")
            continue
        own = [one for one in _pairs(rows) if one.id not in seen]
        chosen = sample(own, max(1, most // (2 * len(contest.earlier))), name)
        seen |= {one.id for one in chosen}
        found += [(earlier, one) for one in chosen]
    now = [one for one in _pairs(examples) if one.id not in learned]
    return [*((name, one) for one in sample(now, most - len(found), name)), *found]


def _pairs(rows: Iterable[Example]) -> list[Example]:
    return [one for one in rows if one.split == "held_out" and one.kind == "pair"]


def _margins(contest: Contest, pairs: Sequence[Example]) -> tuple[list[float | str], list[float | str]]:
    """Of the champion and of the challenger, of each pair; or why there is none."""
    new, old, longest = contest.challenger, contest.champion, contest.limits.longest
    before, after = old.adapter, str(new.adapter)
    if old.base == new.base:
        champions, challengers = contest.score(new.base, [before, after], pairs, longest)
    else:
        (champions,) = contest.score(old.base, [before], pairs, longest)
        (challengers,) = contest.score(new.base, [after], pairs, longest)
    return [_margin(one) for one in champions], [_margin(one) for one in challengers]


def _margin(scored: Mapping[str, Any]) -> float | str:
    if scored.get("left_out"):
        return str(scored["left_out"])
    margin = float(scored["chosen"]) - float(scored["rejected"])
    return margin if math.isfinite(margin) else "have no finite likelihood"


def cohort_name(example: Example) -> str:
    """As a dataset's manifest has it."""
    return "/".join(part or "-" for part in cohort(example))


def sample(found: Iterable[Example], most: int, seed: str) -> list[Example]:
    """So many of them at most; users take turns."""
    turns = Counter[str]()
    ranked = []
    for one in sorted(found, key=lambda one: hashlib.sha256(f"{seed} {one.id}".encode()).digest()):
        ranked.append((turns[who(one)], one))
        turns[who(one)] += 1
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])][: max(0, most)]


# Duels


def asked(contest: Contest, examples: Sequence[Example], seed: str, until: float, notes: list[str]) -> list[Duel]:
    """Both versions' answers to held-out prompts; nobody has judged them yet.

    Where answers are drawn and there are fewer prompts than duels to be asked, each prompt is asked up to `MOST_DRAWS`
    times: that takes out the chance of single draws, and not that of which prompts people had.
    """
    prompts = {prompt_text(one.messages): one for one in examples if one.split == "held_out"}
    chosen = sample(prompts.values(), contest.limits.duels, seed)
    replicas = contest.fleet.replicas
    draws = min(MOST_DRAWS, contest.limits.duels // max(1, len(chosen))) if contest.limits.temperature else 1
    rounds = [(one, draw) for draw in range(max(1, draws)) for one in chosen]

    def fight(numbered: tuple[int, tuple[Example, int]]) -> Duel | str:
        number, (one, draw) = numbered
        replica = replicas[number % len(replicas)]
        how = _drawn(contest.limits, f"{one.id} {draw}")
        pair = both(contest, replica, one.messages, how, turned=hash_bit(f"{one.id} {draw}"))
        if pair["champion"].failed and pair["challenger"].failed:
            return pair["challenger"].failed
        told = number < contest.limits.diverging and not contest.limits.temperature
        return duel(one, pair, divergence(replica, contest.challenger.name, pair) if told else None)

    found = each(fight, list(enumerate(rounds)), until)
    _note_failures(found, len(rounds), "prompts", notes)
    return [one for one in found if isinstance(one, Duel)]


def _drawn(limits: Limits, id: str) -> dict[str, Any]:
    """How an answer is drawn, as vLLM is told."""
    if not limits.temperature:
        return {}
    return {"temperature": limits.temperature, "seed": int(hashlib.sha256(id.encode()).hexdigest()[:7], 16)}


def duel(one: Example, pair: Pair, diverges: float | None = None) -> Duel:
    wants_json = is_json(one.chosen)
    return Duel(
        id=one.id, user=who(one), prompt=prompt_text(one.messages), cohort=cohort_name(one), divergence=diverges,
        answers={side: pair[side].shown for side in SIDES},
        tokens={side: pair[side].tokens for side in SIDES},
        seconds={side: pair[side].seconds for side in SIDES},
        repetitive={side: repeats(pair[side].token_ids or pair[side].text.split()) for side in SIDES},
        broken={
            "champion": broken(pair["champion"], pair["challenger"], wants_json),
            "challenger": broken(pair["challenger"], pair["champion"], wants_json),
        },
        refused={side: refuses(pair[side].text) for side in SIDES},
    )  # fmt: skip


def divergence(replica: Replica, challenger: str, pair: Pair) -> float | None:
    """Share of the champion's first tokens at which the challenger, after the champion's, says another one."""
    said = pair["champion"]
    if not said.prompt_ids or not said.token_ids:
        return None
    try:
        same = list(forced(replica, challenger, Expected(said.prompt_ids, said.token_ids[:DIVERGING_TOKENS])))
        return 1.0 - sum(same) / len(same)
    except Unreachable:
        raise
    except ServingFailed:
        return None


def judged(
    contest: Contest, duels: Sequence[Duel], examples: Sequence[Example], seed: str
) -> tuple[list[Duel], Referee]:
    """The duels with their scores, and who gave them."""
    pairs = [Compared(one.id, one.prompt, one.answers["challenger"], one.answers["champion"]) for one in duels]
    if contest.judge is None:
        model = reward_model.fit(examples)
        scores, referee = model.compare(pairs), model.referee
    else:
        known = people_prefer(sample(_pairs(examples), contest.limits.judged, seed))
        calibrated = calibrate(contest.judge, known)
        said = [*zip(known.pairs, calibrated.verdicts, known.preferred, strict=True), *_love_of_length(contest, duels)]
        scores = _level(pairs, contest.judge.compare(pairs), said)
        referee = calibrated.referee
    return [replace(one, score=score) for one, score in zip(duels, scores, strict=True)], referee


Known = tuple[Compared, float | None, int]
"""Two answers of which more is known than the judge's verdict: which one people prefer (1, −1), or that neither (0)."""


def _love_of_length(contest: Contest, duels: Sequence[Duel]) -> list[Known]:
    """What the judge says of the champion's answers made longer; ½ at least, for they were not made better."""
    assert contest.judge is not None
    some = [(one, said) for one in duels if (said := one.answers["champion"])][: contest.limits.padded]
    pairs = [Compared(one.id, one.prompt, padded(said), said) for one, said in some]
    verdicts = contest.judge.compare(pairs)
    return [(pair, None if told is None else max(0.5, told), 0) for pair, told in zip(pairs, verdicts, strict=True)]


def _level(pairs: Sequence[Compared], verdicts: Sequence[float | None], others: Sequence[Known]) -> list[float | None]:
    """Verdicts as they would be at equal length."""
    known = [(pair, verdict, liked) for pair, verdict, liked in others if verdict is not None]
    told = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not None]
    if not told:
        return list(verdicts)
    scores, _ = at_equal_length(
        [pair.id for pair, _ in told],
        [verdict for _, verdict in told],
        [_longer(pair) for pair, _ in told],
        [verdict for _, verdict, _ in known],
        [_longer(pair) for pair, _, _ in known],
        [liked for _, _, liked in known],
    )
    left = iter(scores.tolist())
    return [None if verdict is None else float(next(left)) for verdict in verdicts]


def _longer(pair: Compared) -> int:
    return len(pair.first) - len(pair.second)


# Goldens


def golden_results(contest: Contest, until: float, notes: list[str]) -> list[GoldenResult]:
    """Both versions on each golden."""
    replicas = contest.fleet.replicas
    grade = contest.judge.grade if contest.judge is not None else None

    def answered(numbered: tuple[int, Golden]) -> GoldenResult:
        number, golden = numbered
        replica, turned = replicas[number % len(replicas)], hash_bit(golden.id)
        pair = both(contest, replica, golden.messages, golden.request, turned)
        none = all(pair[side].failed for side in SIDES)
        verdicts = {
            side: Verdict(None if none else False, f"no answer: {said.failed}")
            if (said := pair[side]).failed
            else check(golden, said.text, said.tool_calls, allow_code=contest.allow_code, grade=grade)
            for side in SIDES
        }
        return GoldenResult(
            id=golden.id, owner=golden.owner, kind=golden.kind, must=golden.must,
            passed={side: verdicts[side].passed for side in SIDES},
            why={side: verdicts[side].why for side in SIDES},
            answers={side: pair[side].shown for side in SIDES},
        )  # fmt: skip

    found = each(answered, list(enumerate(contest.goldens)), until)
    missed = [golden for golden, one in zip(contest.goldens, found, strict=True) if one is None]
    if missed:
        notes.append(f"there was no time for {len(missed)} of {len(contest.goldens)} goldens")
    # What was not asked is not passed: a golden that must hold would be held by nobody's looking.
    unasked = [
        GoldenResult(
            id=one.id, owner=one.owner, kind=one.kind, must=one.must, passed=dict.fromkeys(SIDES),
            why=dict.fromkeys(SIDES, "there was no time"), answers=dict.fromkeys(SIDES, ""),
        )
        for one in missed
    ]  # fmt: skip
    return [*(one for one in found if one is not None), *unasked]


def _note_failures(found: Sequence[object], count: int, named: str, notes: list[str]) -> None:
    if late := sum(one is None for one in found):
        notes.append(f"there was no time for {late} of {count} {named}")
    if refused := [one for one in found if isinstance(one, str)]:
        notes.append(f"neither version answered {len(refused)} of {count} {named}, such as: {refused[0]}")
