"""Segments learned from prompts: found, stable, private, and used by a gateway without a restart."""

from __future__ import annotations

import json
import random
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROUTE, Gateway, MakeGateway, eventually
from fake_vllm import FakeVllm
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import adjusted_rand_score

from router.policy import Prompts
from router.refit import Refits, learn
from router.segments import (
    MIN_PROMPTS,
    MOST_PROMPTS,
    Prompt,
    Segmenter,
    assign,
    fit,
    inherit,
    labelled,
    prompt_of,
    prompts_of,
)
from telemetry.events import Answerer, Interaction
from telemetry.journal import Journal
from understudy.settings import check

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "routing"
TOPICS = {
    "code": "python function list loop return class error compile variable string",
    "cook": "recipe oven flour butter bake sauce onion garlic simmer dish",
    "law": "contract clause tenant liability court notice lease breach damages party",
    "trip": "flight hotel itinerary museum beach train luggage visa weekend island",
}


def prompts(n: int, seed: int = 0, topics: tuple[str, ...] = tuple(TOPICS)) -> tuple[list[str], list[str]]:
    """Texts, and the topic of each."""
    chance = random.Random(seed)
    texts, about = [], []
    for _ in range(n):
        topic = chance.choice(topics)
        words = chance.choices(TOPICS[topic].split(), k=8) + chance.choices(
            ["please", "help", "me", "with", "the", "a", "of", "this"], k=4
        )
        chance.shuffle(words)
        texts.append(" ".join(words))
        about.append(topic)
    return texts, about


def fitted(*args: Any, **more: Any) -> Segmenter:
    found = fit(*args, **more)
    assert isinstance(found, Segmenter), found
    return found


TEXTS, ABOUT = prompts(600)
LEARNED = fitted(TEXTS, 0.0, 0)


def test_topics_are_found_and_their_number_too() -> None:
    assert adjusted_rand_score(ABOUT, [assign(LEARNED, text) for text in TEXTS]) > 0.95
    fresh, about = prompts(200, seed=1)
    assert adjusted_rand_score(about, [assign(LEARNED, text) for text in fresh]) > 0.9
    assert len(LEARNED.names) == len(TOPICS)


def test_the_same_texts_make_the_same_segments_in_any_order() -> None:
    shuffled = random.Random(3).sample(TEXTS, len(TEXTS))
    assert fitted(shuffled, 0.0, 0) == LEARNED
    assert fitted(shuffled, 9.0, 0).version == LEARNED.version, "a version names what is learned, not when"
    assert fitted(prompts(600, seed=2)[0], 0.0, 0).version != LEARNED.version


def test_it_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(LEARNED), type=Segmenter) == LEARNED


def test_noise_makes_no_segments() -> None:
    chance = random.Random(0)
    words = [f"w{n}" for n in range(400)]
    said = fit([" ".join(chance.choices(words, k=10)) for _ in range(600)], 0.0, 0)
    assert isinstance(said, str)
    assert "agree on no clusters" in said


def test_few_prompts_make_none_and_copies_count_once() -> None:
    said = fit(TEXTS[:50] * 100, 0.0, 0)
    assert said == f"50 distinct prompts; {MIN_PROMPTS} are needed"
    assert fit([], 0.0, 0) == f"0 distinct prompts; {MIN_PROMPTS} are needed"


def test_a_number_that_is_asked_for_is_the_most_there_are() -> None:
    assert len(fitted(TEXTS, 0.0, 0, k=2).names) == 2
    for k in (0, 1, 33):
        with pytest.raises(ValueError, match="ask for 2 to 32"):
            fit(TEXTS, 0.0, 0, k=k)


# Refits


def test_after_a_refit_what_is_still_the_same_has_its_name() -> None:
    grown = TEXTS + prompts(300, seed=5)[0]
    new = inherit(fitted(grown, 1.0, 0), LEARNED, grown)
    assert set(new.names) == set(LEARNED.names)
    same = sum(assign(new, text) == assign(LEARNED, text) for text in grown)
    assert same / len(grown) > 0.95


def test_a_new_topic_has_a_new_name_and_the_others_keep_theirs() -> None:
    before, _ = prompts(600, topics=("code", "cook", "law"))
    old = fitted(before, 0.0, 0)
    now = before + prompts(300, seed=7, topics=("trip",))[0]
    new = inherit(fitted(now, 1.0, 0), old, now)
    assert set(old.names) < set(new.names)
    assert len(set(new.names)) == len(new.names)
    assert new.version != old.version


# Hostile text


@given(st.text(max_size=300) | st.sampled_from(["", "\x00", "‮evil", "🙂" * 5000, "a" * 10**6, "\udcff", "ﷺ" * 3000]))
@settings(max_examples=200, deadline=None)
def test_any_text_has_a_segment_or_none(text: str) -> None:
    assert assign(LEARNED, text) in ("", *LEARNED.names)


BODIES = [
    (b'[{"role":"system","content":"s"},{"role":"user","content":"hello"},{"role":"user","content":"x"}]', "hello"),
    (b'[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url"},{"text":"b"}]}]', "a\nb"),
    (b'"just a prompt"', "just a prompt"),
    (b'[{"role":"assistant","content":"hi"}]', ""),
    (b'[{"role":"user","content":7}]', ""),
    (b'[{"role":"user"}]', ""),
    (b"[1,2]", ""),
    (b"{}", ""),
    (b"null", ""),
    (b"nonsense", ""),
    (b'"\xff"', ""),
    (b"[" * 10_000, ""),
    (b'"' + b"x" * 100_000 + b'"', ""),
]


@pytest.mark.parametrize(("body", "text"), BODIES)
def test_the_first_users_text_is_what_a_session_began_with(body: bytes, text: str) -> None:
    assert prompt_of(msgspec.Raw(body)) == text


@given(st.binary(max_size=200))
def test_any_body_has_a_prompt_or_none(body: bytes) -> None:
    assert isinstance(prompt_of(body), str)


# Labels


def test_labels_tell_of_topics_and_of_nobody() -> None:
    said = [Prompt(f"s{n}", text) for n, text in enumerate(TEXTS)]
    said += [Prompt("s0", f"{TOPICS['code']} annabel") for _ in range(50)]  # one session, however often
    found = labelled(LEARNED, said)
    for name, label in zip(found.names, found.labels, strict=True):
        topic = next(about for about, text in zip(ABOUT, TEXTS, strict=True) if assign(LEARNED, text) == name)
        assert set(label.split()) <= set(TOPICS[topic].split())
    assert "annabel" not in " ".join(found.labels)
    assert labelled(LEARNED, said[:3]).labels == ("",) * len(LEARNED.names)
    assert found.version == LEARNED.version, "words say what a segment is, not which"


def asked(n: int, text: str | None, route: str = ROUTE, consent: str | None = None) -> Interaction:
    return Interaction(
        event_id=f"e{n}", at=float(n), request_id=f"r{n}", route=route, tenant="t", session=f"s{n}",
        answerer=Answerer("a", "m"), consent=consent, messages=[{"role": "user", "content": text}] if text else None,
    )  # fmt: skip


def test_prompts_come_from_one_route_with_text_and_consent() -> None:
    facts = [asked(1, "one"), asked(2, None), asked(3, "three", route="other"), asked(4, "four", consent="none")]
    assert prompts_of(ROUTE, facts) == [Prompt("1:t/s1", "one")]
    taken: list[int] = []

    def many() -> Any:
        for n in range(MOST_PROMPTS * 2):
            taken.append(n)
            yield asked(n, f"text {n}")

    assert len(prompts_of(ROUTE, many())) == MOST_PROMPTS == len(taken)


# On schedule


def test_a_fit_is_asked_for_once_and_there_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db")
    refits = Refits(tmp_path / "j.db")
    assert refits.ready(ROUTE, None, None, 100.0) is None
    eventually(lambda: refits._running[ROUTE].done())
    assert refits.ready(ROUTE, None, None, 101.0) is None, "no prompts, no segments"
    assert refits.ready(ROUTE, None, None, 102.0) is None
    assert refits._running == {}, "not at once again"
    journal.append([asked(n, text) for n, text in enumerate(TEXTS)])
    assert refits.ready(ROUTE, None, None, 500.0) is None
    found = eventually(lambda: refits.ready(ROUTE, None, None, 500.0), 20)
    assert (found.version, found.at) == (LEARNED.version, 500.0)
    assert all(found.labels)
    assert learn(tmp_path / "j.db", ROUTE, found, None, 600.0).names == found.names  # type: ignore[union-attr]
    refits.close()
    journal.close()


def test_a_fit_that_fails_is_tried_again_later_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Segmenter:
        raise ZeroDivisionError("somewhere in a library")

    monkeypatch.setattr("router.refit.learn", broken)
    refits = Refits(tmp_path / "j.db")
    assert refits.ready(ROUTE, None, None, 100.0) is None
    eventually(lambda: refits.done(ROUTE))
    assert refits.ready(ROUTE, None, None, 101.0) is None
    assert not refits.done(ROUTE)
    assert "somewhere in a library" in caplog.text
    refits.close()


def test_a_gateway_routes_each_cluster_of_prompts_by_itself(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Path
) -> None:
    with closing(Journal(tmp_path / "j.db")) as journal:  # what was asked before
        journal.append([msgspec.structs.replace(asked(n, text), at=time.time()) for n, text in enumerate(TEXTS)])
    arms = {"champion": {"model": "good"}, "challenger": {"model": "bad"}}
    policy = {"segment_by": "prompt", "floor": 0.0, "holdout": 0.0}
    gw = gateway(fake, arms=arms, policy=policy, reward={"window": "1s"}, journal=str(tmp_path / "j.db"))
    eventually(lambda: _segmenters(gw), 20)
    texts, about = prompts(80, seed=11, topics=("code", "law"))
    wants = {"code": "champion", "law": "challenger"}
    for n, (text, topic) in enumerate(zip(texts, about, strict=True)):
        said = gw.chat(text, headers={"x-understudy-session": f"new {n}"}).json()
        arm = gw.interaction(len(TEXTS) + n + 1).answerer.arm
        gw.feedback({"response_id": said["id"], "kind": "thumb", "value": arm == wants[topic]})
    named = {i.answerer.segment for i in gw.interactions()[len(TEXTS) :]}
    assert len(named) == 2
    assert "" not in named

    def learned() -> bool:
        with gw.store() as store:
            snapshot = store.snapshot(ROUTE)
        assert snapshot is not None
        shares = [snapshot.segments[name] for name in named & snapshot.segments.keys()]
        return {max(share, key=share.__getitem__) for share in shares} == {"champion", "challenger"}

    eventually(learned, 10)


def _segmenters(gw: Gateway) -> object:
    """What the gateway's own worker has learned of."""
    with gw.journal() as journal:
        return json.loads(journal.known("gateway") or b"{}").get("segmenters")


# Config


def test_the_config_says_what_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"clusters": 1}, {"clusters": 33}, {"refit": 0}):
        with pytest.raises(ValidationError):
            Prompts.model_validate(wrong)
    path = tmp_path / "understudy.yaml"
    route = "{upstreams: ['http://h:1'], arms: {x: {model: m}}, policy: {kind: thompson, segment_by: prompt}"
    written = f"routes:\n  a: {route}"
    path.write_text(written + "}\n")
    assert check(path) == []
    path.write_text(written + "}\ncapture: {text: 'off'}\n")
    (problem,) = check(path)
    assert (problem.line, problem.key) == (2, "routes.a.policy.segment_by")
    path.write_text(written + ", capture: redacted}\ncapture: {text: 'off'}\n")
    assert check(path) == []


def test_recorded_prompts_fall_into_the_benchmarks_that_they_come_from() -> None:
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    rows = [
        json.loads(line) for file in sorted(SHARED.glob("*.jsonl")) for line in file.read_text().split("\n") if line
    ]
    found = fitted([row["prompt"] for row in rows], 0.0, 0)
    assert adjusted_rand_score([row["source"] for row in rows], [assign(found, row["prompt"]) for row in rows]) > 0.6
