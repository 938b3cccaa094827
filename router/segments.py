"""Segments learned from what is asked: prompts in clusters, each with shares of its own. Pure.

    first user texts → words → buckets → TF-IDF vectors → spherical k-means → a table of integers → "c3@5be1f09a"

Words are hashed into `BUCKETS` (Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning"), so the
table has one size and holds no words; how often a word is said in one text does not count. Clusters are found by
MiniBatchKMeans (scikit-learn; Sculley 2010) and polished on the sphere (Dhillon & Modha 2001). There are as many as two
halves of the prompts, clustered apart, agree best on (Lange et al. 2004, "Stability-based validation of clustering
solutions"); where they agree on none, there are no segments.

A name says in which table its cluster was born and is never given to another. After a refit clusters that are still
mostly the same prompts keep their names (`inherit`), so their evidence goes on; what was heard under a name that was
given up stays, ages, and goes on informing the group's mean, from which each new name starts.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from router.bandit import Floats
from router.store import session_key
from telemetry.events import Interaction

Table = NDArray[np.int16]

BUCKETS = 1024
READ = 2000
"""Characters of a text that are read."""
LONG = 64 * 1024
"""Bytes of a conversation above which it is not taken apart."""

MIN_PROMPTS = 200
"""Distinct prompts below which there is nothing to learn from."""
MOST_PROMPTS = 20_000
MOST_CLUSTERS = 32
TRIED = (2, 3, 4, 6, 8, 12, 16)
"""Numbers of clusters, of which the one agreed on best is taken."""
SPLITS, SAMPLE = 3, 4000
"""How often, and of how many prompts, two halves are compared."""
AGREED = 0.2
"""Adjusted Rand index of two halves below which there are no clusters to speak of; 0 is chance."""
POLISH = 10

LABEL_WORDS = 3
LABEL_USERS = 5
"""Users (or sessions of nobody known) who said a word of a label at least, so that it tells of nobody."""

_WORD = re.compile(r"[^\W_]+")


class Prompt(NamedTuple):
    """What a session began with, and who began it."""

    who: str
    text: str


class Segmenter(msgspec.Struct, frozen=True):
    """Clusters of prompts: what each bucket says for each of them."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Distinct prompts in each, when it was fitted."""
    table: bytes
    """Little-endian int16 [BUCKETS, clusters]: a text is in the cluster with the largest sum over its buckets."""
    agreement: float
    """Adjusted Rand index of the clusters found in two halves of the prompts; 1 is the same, 0 chance."""
    at: float
    labels: tuple[str, ...] = ()
    """Of each cluster the most telling words; "" where none may be told."""

    @property
    def version(self) -> str:
        """Of what texts are assigned to, whenever that was learned."""
        return _digest(self.table + repr(self.names).encode())


def assign(segmenter: Segmenter, text: str) -> str:
    """The name of the text's cluster; "" if nothing in it speaks for any. Never raises."""
    at = _place(segmenter, text)
    return segmenter.names[at] if at >= 0 else ""


def fit(texts: Iterable[str], at: float, seed: int, k: int | None = None) -> Segmenter | str:
    """Clusters of the texts, as of `at`, or the reason why there are none; the order of the texts does not matter.

    `k`: at most so many clusters, 2 to `MOST_CLUSTERS`, or None for as many as are agreed on; ValueError if it is
    another number. 20,000 texts take seconds: not for a thread that has something else to do.
    """
    if k is not None and not 2 <= k <= MOST_CLUSTERS:
        raise ValueError(f"{k} clusters of prompts are asked for; ask for 2 to {MOST_CLUSTERS}, or None")
    seen = sorted({tuple(sorted(buckets)) for text in texts if (buckets := _buckets(_words(text)))})
    if len(seen) < MIN_PROMPTS:
        return f"{len(seen)} distinct prompts; {MIN_PROMPTS} are needed"
    said, x, idf = _vectors(seen)
    chance = np.random.default_rng(seed)
    agreed = {tried: _agreement(x, tried, chance) for tried in (TRIED if k is None else (k,))}
    best = max(agreed, key=lambda tried: agreed[tried])
    if k is None and agreed[best] < AGREED:
        return f"two halves of {len(seen)} prompts agree on no clusters (index {agreed[best]:.2f}; {AGREED} is needed)"
    scale = _centres(x, best, seed) * idf
    table = np.rint(scale.T * (np.iinfo(np.int16).max / max(scale.max(), 1e-12))).astype("<i2")
    sizes = np.bincount((said @ table.astype(np.int64)).argmax(1), minlength=best)
    table, sizes = np.ascontiguousarray(table[:, sizes > 0]), sizes[sizes > 0]
    born = _digest(table.tobytes())
    names = tuple(f"c{place}@{born}" for place in range(len(sizes)))
    return Segmenter(names, tuple(sizes.tolist()), table.tobytes(), round(agreed[best], 3), at)


def inherit(new: Segmenter, old: Segmenter, texts: Iterable[str]) -> Segmenter:
    """`new`, where a cluster that shares most of its texts with one of `old`, and most of that one's, has its name.

    Most is more than half of either, so no two clusters claim one name and no optimal matching has to be found.
    """
    both = np.zeros((len(new.names), len(old.names)))
    of_new, of_old = np.zeros(len(new.names)), np.zeros(len(old.names))
    for text in texts:
        here, there = _place(new, text), _place(old, text)
        if here >= 0:
            of_new[here] += 1
        if there >= 0:
            of_old[there] += 1
        if here >= 0 and there >= 0:
            both[here, there] += 1
    same = (2 * both > of_new[:, None]) & (2 * both > of_old)
    pairs = zip(new.names, same, strict=True)
    return replace(new, names=tuple(old.names[int(row.argmax())] if row.any() else name for name, row in pairs))


def labelled(segmenter: Segmenter, prompts: Iterable[Prompt]) -> Segmenter:
    """`segmenter` with its clusters' most telling words; only for prompts whose text may be kept.

    A word must be of letters only and occur in the cluster's prompts of `LABEL_USERS` users; words are ranked by
    their share of what tells the cluster from all prompts, p log(p / q) (Kullback & Leibler 1951).
    """
    heard: dict[tuple[int, str], set[str]] = {}
    for prompt in prompts:
        place = _place(segmenter, prompt.text)
        if place >= 0:
            heard.setdefault((place, prompt.who), set()).update(_words(prompt.text))
    sessions = Counter(place for place, _ in heard)
    counts = {
        place: Counter(chain.from_iterable(words for (at, _), words in heard.items() if at == place))
        for place in sessions
    }
    overall = sum(counts.values(), Counter())
    shares = {word: count / len(heard) for word, count in overall.items() if count >= LABEL_USERS}
    return replace(
        segmenter,
        labels=tuple(
            _label(counts[place], sessions[place], shares) if place in counts else ""
            for place in range(len(segmenter.names))
        ),
    )


def prompts_of(route: str, interactions: Iterable[Interaction]) -> list[Prompt]:
    """What the sessions of a route began with, once each, of interactions that have text; the first `MOST_PROMPTS`.

    Left out is what a user agreed to nothing for. No more interactions are taken than are needed.
    """
    found: dict[Prompt, None] = {}
    for i in interactions:
        if i.route == route and i.messages is not None and i.consent != "none":
            text = prompt_of(msgspec.json.encode(i.messages))
            if text:
                found[Prompt(session_key(i.tenant, i.user or i.session), text)] = None
        if len(found) >= MOST_PROMPTS:
            break
    return list(found)


def prompt_of(messages: bytes | msgspec.Raw) -> str:
    """The first user's text in `messages`, `input` or `prompt` as JSON, `READ` characters of it; "" if there is none.

    Never raises.
    """
    if len(messages) > LONG:
        return ""
    try:
        said = _messages.decode(messages)
        if not isinstance(said, str):
            said = _content.decode(next((turn.content for turn in said if turn.role == "user"), b'""'))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return said[:READ] if isinstance(said, str) else "\n".join(part.text for part in said if part.text)[:READ]


class _Turn(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b'""')


class _Part(msgspec.Struct):
    text: str = ""


_messages = msgspec.json.Decoder(str | list[_Turn])
_content = msgspec.json.Decoder(str | list[_Part])


def _place(segmenter: Segmenter, text: str) -> int:
    """Which cluster a text is in, or -1."""
    buckets = _buckets(_words(text))
    if not buckets:
        return -1
    table: Table = np.frombuffer(segmenter.table, "<i2").reshape(BUCKETS, -1)
    scores = table[list(buckets)].sum(0)
    at = int(scores.argmax())
    return at if scores[at] > 0 else -1


def _words(text: str) -> set[str]:
    head = text[:READ]
    if not head.isascii():
        head = unicodedata.normalize("NFKC", head)[:READ]
    return set(_WORD.findall(head.lower()))


def _buckets(words: Iterable[str]) -> set[int]:
    return {crc32(word.encode()) % BUCKETS for word in words}


def _vectors(seen: Sequence[Iterable[int]]) -> tuple[Any, Any, Floats]:
    """Which buckets texts have [N, BUCKETS], their unit TF-IDF vectors (both sparse), and log(N / df) [BUCKETS]."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    said = CountVectorizer(analyzer=iter, vocabulary={bucket: bucket for bucket in range(BUCKETS)}).transform(seen)
    idf = np.log(len(seen) / np.maximum(1, said.getnnz(0)))
    return said, normalize(said.multiply(idf).tocsr()), np.asarray(idf)


def _centres(x: Any, k: int, seed: int) -> Floats:
    """Unit centres [k, BUCKETS] of the rows of x; one that nothing is nearest to is 0."""
    from sklearn.cluster import MiniBatchKMeans

    centres = MiniBatchKMeans(k, random_state=seed, n_init=5, batch_size=1024).fit(x).cluster_centers_
    for _ in range(POLISH):
        centres = (x.T @ np.eye(k)[(x @ centres.T).argmax(1)]).T
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return np.asarray(centres)


def _agreement(x: Any, k: int, chance: np.random.Generator) -> float:
    """How alike the clusters are that two halves of x find, on all that both hold; the mean of `SPLITS` tries."""
    from sklearn.metrics import adjusted_rand_score

    found = []
    for split in range(SPLITS):
        some = x[chance.permutation(x.shape[0])[:SAMPLE]]
        half = some.shape[0] // 2
        halves = (_centres(part, k, split) for part in (some[:half], some[half:]))
        found.append(adjusted_rand_score(*((some @ centres.T).argmax(1) for centres in halves)))
    return float(np.mean(found))


def _label(counts: Mapping[str, int], sessions: int, shares: Mapping[str, float]) -> str:
    telling = {
        word: count / sessions * np.log(count / sessions / shares[word])
        for word, count in counts.items()
        if count >= LABEL_USERS and word.isalpha() and len(word) > 1
    }
    best = sorted((word for word in telling if telling[word] > 0), key=lambda word: (-telling[word], word))
    return " ".join(best[:LABEL_WORDS])


def _digest(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=4).hexdigest()
