"""Who wins a duel, where there is no judge: a small model of which answers people prefer.

Bradley and Terry (1952): logit P(a is preferred to b) = r(a) − r(b), so a logistic regression, without intercept, on
the difference of the two answers' features. These are hashed words, pairs of words and runs of four characters of an
answer, pairs of a word of the prompt and one of the answer, and how much of the prompt it takes up. The features of an
answer have length 1 (L2), so that more words are not more of everything; how much longer it is stands apart, and is
left out of the scores: they are at equal length, as a judge's (`learner.score`).

Trained on a dataset's train split and made into probabilities there (Platt 1999), each user predicted by a model that
never saw them. What it is worth, its held-out split tells, whose users it never saw. It is nobody's referee unless it
surely (95 %) agrees with people on more than `NEEDED` of the pairs: then all its scores are None.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from learner.examples import Example
from learner.expectations import prompt_text
from learner.judge import Compared, Preferred, agreement
from learner.measured import Referee
from learner.people import who
from learner.score import Floats, steepness

NEEDED = 0.55
FEWEST, FEWEST_HELD_OUT = 40, 20
"""Pairs to learn from, and to be measured on."""
FEWEST_USERS = 5
"""Of either."""
MOST = 5000
"""Pairs to learn from, the newest."""
FOLDS = 5
FEATURES = 2**16
C = 3.0
"""Inverse of the regularization."""
_WORD = re.compile(r"\w+")
_LENGTH = "length"
_PROMPT_WORDS, _ANSWER_WORDS, _CHARS = 24, 64, 600
"""Of each text, looked at: a prompt's last words, an answer's first."""

Features = dict[str, float]


class RewardModel(NamedTuple):
    """A fitted model, and what it is worth."""

    referee: Referee
    coefficients: Floats | None = None
    steep: float = 0.0

    def compare(self, pairs: Sequence[Compared]) -> list[float | None]:
        """P(people prefer the first) of each pair, at equal length; None where it is nobody's referee."""
        if self.coefficients is None:
            return [None for _ in pairs]
        told = _level((difference(one.prompt, one.first, one.second) for one in pairs), len(pairs)) @ self.coefficients
        return [float(1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, self.steep * z))))) for z in told]


def fit(found: Iterable[Example]) -> RewardModel:
    """The model of a dataset's pairs: of its train split, measured on its held-out one."""
    pairs = [one for one in found if one.kind == "pair" and one.chosen and one.rejected]
    held_out = [one for one in pairs if one.split == "held_out"]
    train = sorted((one for one in pairs if one.split == "train"), key=lambda one: (-one.at, one.id))[:MOST]
    for rows, fewest, named in ((train, FEWEST, "learn from"), (held_out, FEWEST_HELD_OUT, "be measured on")):
        users = len({who(one) for one in rows})
        if len(rows) < fewest or users < FEWEST_USERS:
            return nobody(f"{len(rows)} pairs of {users} users to {named}; it needs {fewest} pairs of {FEWEST_USERS}")
    rows = _hashed(_differences(train))  # hashed one by one: as words they would take gigabytes
    level = _level(_differences(train), len(train))
    weights, folds = np.array([one.weight for one in train]), np.array([_fold(who(one)) for one in train])
    others = np.zeros(len(train))
    for fold in sorted(set(folds.tolist())):
        inside, out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if not inside.size:
            return nobody("too few users gave the pairs to learn from")
        others[out] = level[out] @ _fitted(rows[inside], weights[inside])
    model = RewardModel(nobody("").referee, _fitted(rows, weights), steepness(others, weights))
    return _measured(model, held_out)


def nobody(why: str) -> RewardModel:
    return RewardModel(Referee(name="nobody", why=why))


def people_prefer(found: Iterable[Example]) -> Preferred:
    """Pairs that people judged; which answer comes first follows from the example's hash."""
    known = Preferred([], [], [])
    for one in found:
        if one.kind == "pair" and one.chosen is not None and one.rejected is not None:
            first = hashlib.sha256(one.id.encode()).digest()[0] % 2 == 0
            answers = (one.chosen, one.rejected) if first else (one.rejected, one.chosen)
            known.pairs.append(Compared(one.id, prompt_text(one.messages), *answers))
            known.preferred.append(1 if first else -1)
            known.users.append(who(one))
    return known


def difference(prompt: str, first: str, second: str) -> Features:
    """The first answer's features less the second's."""
    found = features(prompt, first)
    for name, value in features(prompt, second).items():
        found[name] = found.get(name, 0.0) - value
    return {name: value for name, value in found.items() if value}


def features(prompt: str, answer: str) -> Features:
    words, asked = _WORD.findall(answer.lower()), _WORD.findall(prompt.lower())
    plain, said = " ".join(answer[:_CHARS].lower().split()), words[:_ANSWER_WORDS]
    names = {f"w {word}" for word in words}
    names |= {f"b {one} {other}" for one, other in pairwise(words)}
    names |= {f"c {plain[at : at + 4]}" for at in range(len(plain) - 3)}
    crossed = {f"x {one} {other}" for one in asked[-_PROMPT_WORDS:] for other in said}
    found = {name: 1.0 / math.sqrt(len(names)) for name in names}
    found |= {name: 1.0 / math.sqrt(len(crossed)) for name in crossed}
    found["overlap"] = len(set(asked) & set(words)) / max(1, len(set(asked)))
    found[_LENGTH] = math.log1p(len(answer))
    return found


def _differences(found: Iterable[Example]) -> Iterator[Features]:
    for one in found:
        yield difference(prompt_text(one.messages), one.chosen or "", one.rejected or "")


def _fitted(rows: Any, weights: Floats) -> Floats:
    """Coefficients of the hashed features. Each pair stands in there both ways round, or there would be one class."""
    from sklearn.linear_model import LogisticRegression

    n = rows.shape[0]
    both = rows[np.r_[0:n, 0:n]]
    both.data[both.indptr[n] :] *= -1.0
    # liblinear has no threads, which would wait for each other where others use the cores.
    model = LogisticRegression(C=C, fit_intercept=False, solver="liblinear", tol=1e-3)
    model.fit(both, np.repeat([1, 0], n), np.concatenate([weights, weights]))
    return np.asarray(model.coef_[0], float)


def _level(differences: Iterable[Features], n: int) -> Any:
    """The rows of as many pairs at equal length."""
    if not n:
        return np.zeros((0, FEATURES))
    return _hashed({name: value for name, value in one.items() if name != _LENGTH} for one in differences)


def _hashed(rows: Iterable[Features]) -> Any:
    from sklearn.feature_extraction import FeatureHasher

    return FeatureHasher(FEATURES, input_type="dict").transform(rows)


def _measured(model: RewardModel, held_out: Sequence[Example]) -> RewardModel:
    known = people_prefer(held_out)
    found = agreement("reward model", model.compare(known.pairs), known)
    least = found.least or 0.0
    if least > NEEDED:
        return model._replace(referee=found)
    return nobody(
        f"the reward model agrees with people on {found.agreement or 0:.0%} of {found.pairs} held-out pairs, surely on "
        f"no more than {least:.0%}; {NEEDED:.0%} is needed. Name a judge under learner.gate"
    )


def _fold(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] % FOLDS
