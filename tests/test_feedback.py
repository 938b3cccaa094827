"""What apps and users say about answers: taken, kept, joined, counted once, and only from those who may speak."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from typing import Any

import pytest
from conftest import ROUTE, Gateway, MakeGateway, eventually
from fake_vllm import Behaviour, FakeVllm

from gateway.auth import TokenSigner
from telemetry.writer import JournalWriter

TOKEN = "x-understudy-feedback-token"


def answered(gw: Gateway, text: str = "hello", **headers: str) -> tuple[str, str]:
    """The id and the feedback token of a new answer."""
    said = gw.chat(text, headers=headers)
    return said.json()["id"], said.headers[TOKEN]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def named(name: str) -> Behaviour:
    """An answer whose upstream names it itself."""
    return Behaviour("raw_stream", data=b'data: {"id":"%b","choices":[]}\n\n' % name.encode())


# What is taken

VALID: list[tuple[dict[str, Any], float | None]] = [
    ({"kind": "thumb", "value": True}, 1.0),
    ({"kind": "thumb", "value": False}, 0.0),
    ({"kind": "thumb", "value": "up"}, 1.0),
    ({"kind": "thumb", "value": "down"}, 0.0),
    ({"kind": "thumb", "value": 1}, 1.0),
    ({"kind": "rating", "value": 1}, 1.0),
    ({"kind": "rating", "value": 4.5}, 4.5),
    ({"kind": "correction", "text": "better"}, None),
    ({"kind": "correction", "value": "better"}, None),
    ({"kind": "comparison", "value": {"winner": "a", "loser": "b"}}, None),
    ({"kind": "comparison", "target": {"winner": "a", "loser": "b"}}, None),
    ({"kind": "comparison", "value": {"tie": ["a", "b"]}}, None),
    ({"kind": "comparison", "value": "tie", "target": ["a", "b"]}, None),
    ({"kind": "comparison", "value": {"both_bad": ["a", "b"]}}, None),
    ({"kind": "comparison", "value": "both_bad", "target": ["a", "b"]}, None),
    ({"kind": "comment", "text": "né 🙂"}, None),
    ({"kind": "flag", "value": "harmful"}, None),
    ({"kind": "flag"}, None),
    ({"kind": "survey", "name": "nps", "value": 9}, 9.0),
    ({"kind": "copy"}, None),
    ({"kind": "copy", "value": 0.5}, 0.5),
    ({"kind": "edit", "value": 12, "text": "new"}, 12.0),
    ({"kind": "accept"}, None),
    ({"kind": "retry"}, None),
    ({"kind": "regenerate"}, None),
    ({"kind": "abandon"}, None),
    ({"kind": "dwell", "value": 3.5}, 3.5),
    ({"kind": "first_action", "value": 0}, 0.0),
    ({"kind": "escalation", "value": "to a human"}, None),
    ({"kind": "outcome", "value": {"name": "resolved", "value": 1}}, 1.0),
    ({"kind": "outcome", "name": "revenue", "value": -12.5}, -12.5),
    ({"kind": "outcome", "value": {"name": "resolved", "value": True}}, 1.0),
]


@pytest.mark.parametrize(("item", "value"), VALID, ids=lambda x: json.dumps(x))
def test_a_valid_item_is_on_disk_when_202_is_said(
    gateway: MakeGateway, fake: FakeVllm, item: dict[str, Any], value: float | None
) -> None:
    gw = gateway(fake)
    said = gw.feedback({"response_id": "chatcmpl-x"} | item)
    assert said.status_code == 202
    assert said.json()["accepted"] == 1
    (signal,) = [one for one in gw.signals() if one.source != "detected"]  # what a comparison says of each answer
    assert said.json()["ids"] == [signal.event_id]
    assert (signal.kind, signal.value, signal.source) == (item["kind"], value, "callback")


def test_the_text_of_a_correction_is_kept_wherever_it_was_written(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    gw.feedback({"response_id": "x", "kind": "correction", "text": "better"})
    gw.feedback({"response_id": "x", "kind": "correction", "value": "best"})
    assert [s.text for s in gw.signals()] == ["better", "best"]


HUGE = int("1" + "0" * 400)
INVALID: list[tuple[dict[str, Any], str | None]] = [
    ({"kind": "thumbs", "value": True}, "kind"),
    ({"value": True}, None),
    ({"kind": 5}, "kind"),
    ({"kind": "thumb"}, "value"),
    ({"kind": "thumb", "value": 2}, "value"),
    ({"kind": "thumb", "value": "yes"}, "value"),
    ({"kind": "thumb", "value": [1]}, "value"),
    ({"kind": "rating"}, "value"),
    ({"kind": "rating", "value": 0}, "value"),
    ({"kind": "rating", "value": 5.1}, "value"),
    ({"kind": "rating", "value": "5"}, "value"),
    ({"kind": "rating", "value": HUGE}, "value"),
    ({"kind": "correction"}, "text"),
    ({"kind": "correction", "value": 7}, "text"),
    ({"kind": "comparison"}, "value"),
    ({"kind": "comparison", "value": {"winner": "a"}}, "value"),
    ({"kind": "comparison", "value": {"winner": "a", "loser": "a"}}, "value"),
    ({"kind": "comparison", "value": {"tie": ["a"]}}, "value"),
    ({"kind": "comparison", "value": "tie"}, "value"),
    ({"kind": "copy", "value": "a lot"}, "value"),
    ({"kind": "dwell"}, "value"),
    ({"kind": "dwell", "value": -1}, "value"),
    ({"kind": "first_action", "value": "soon"}, "value"),
    ({"kind": "outcome", "value": 1}, "value"),
    ({"kind": "outcome", "value": {"name": "", "value": 1}}, "value"),
    ({"kind": "outcome", "name": "resolved", "value": "yes"}, "value"),
    ({"kind": "outcome", "name": "resolved", "value": HUGE}, "value"),
    ({"kind": "comment", "text": "x" * 40_000}, "text"),
    ({"kind": "comment", "text": 5}, "text"),
    ({"kind": "copy", "at": "yesterday"}, "at"),
    ({"kind": "copy", "response_id": ""}, "response_id"),
    ({"kind": "copy", "response_id": 7}, "response_id"),
]


@pytest.mark.parametrize(("item", "param"), INVALID, ids=lambda x: json.dumps(x)[:60])
def test_an_invalid_item_is_refused_naming_the_field(
    gateway: MakeGateway, fake: FakeVllm, item: dict[str, Any], param: str | None
) -> None:
    gw = gateway(fake)
    said = gw.feedback({"response_id": "chatcmpl-x"} | item)
    assert said.status_code == 400
    error = said.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]
    assert gw.signals() == []


@pytest.mark.parametrize("body", [b"", b"{", b"5", b'"x"', b"[]", b"null", b"\xff", b"[" * 50_000])
def test_a_body_that_is_no_feedback_is_a_400(gateway: MakeGateway, fake: FakeVllm, body: bytes) -> None:
    said = gateway(fake).http.post("/v1/feedback", content=body)
    assert said.status_code == 400
    assert said.json()["error"]["type"] == "invalid_request_error"


def test_an_answer_is_known_at_once(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    for n in range(10):
        answer, _ = answered(gw, str(n))
        assert gw.http.get(f"/v1/feedback/{answer}").status_code == 200
        answer, _ = answered(gw, str(n))
        correction = {"kind": "correction", "response_id": answer, "text": f"better {n}"}
        assert gw.http.post("/v1/feedback", json=correction).status_code == 202
    assert [s.text for s in gw.signals() if s.kind == "correction"] == [f"better {n}" for n in range(10)]


def test_too_many_items_are_a_413(gateway: MakeGateway, fake: FakeVllm) -> None:
    assert gateway(fake).feedback([{"response_id": "x", "kind": "copy"}] * 1001).status_code == 413


def test_one_bad_item_of_a_batch_is_named_by_index_and_the_others_are_kept(
    gateway: MakeGateway, fake: FakeVllm
) -> None:
    gw = gateway(fake)
    good = {"response_id": "x", "kind": "thumb", "value": True}
    said = gw.feedback([good, good | {"value": 9}, good | {"kind": "copy", "value": None}])
    assert said.status_code == 202
    body = said.json()
    assert (body["accepted"], len(body["ids"])) == (2, 2)
    assert [(e["index"], e["param"]) for e in body["errors"]] == [(1, "value")]
    assert [s.kind for s in gw.signals()] == ["thumb", "copy"]


def test_a_batch_of_bad_items_only_is_refused(gateway: MakeGateway, fake: FakeVllm) -> None:
    said = gateway(fake).feedback([{"response_id": "x", "kind": "nope"}] * 2)
    assert said.status_code == 400
    assert "item 0" in said.json()["error"]["message"]


def test_times_are_taken_from_the_item_but_never_from_the_future(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    item = {"response_id": "x", "kind": "copy"}
    for at in (1_700_000_000, "2023-11-14T22:13:20Z", 4e12):
        gw.feedback(item | {"at": at})
    first, second, third = gw.signals()
    assert first.at == second.at == 1_700_000_000
    assert third.at <= time.time()


# Joined to its answer


def test_feedback_on_an_unknown_answer_is_kept_and_joined_when_the_answer_comes(
    gateway: MakeGateway, fake: FakeVllm
) -> None:
    gw = gateway(fake)
    fake.script(Behaviour("hang_mid_stream", after=2))
    with gw.http.stream(
        "POST", "/v1/chat/completions",
        json={"model": ROUTE, "stream": True, "messages": [{"role": "user", "content": "hi"}]},
    ) as said:  # fmt: skip
        item = {"response_id": f"chatcmpl-{said.headers['x-request-id']}", "kind": "thumb", "value": True}
        assert gw.feedback(item).status_code == 202
        assert gw.sums() == {}
        assert gw.interactions() == []
        fake.release()
        said.read()
    gw.wait_interactions()
    assert gw.sums()["champion"].n == 1.0
    assert gw.sums()["champion"].s == 1.0


@pytest.mark.parametrize("name", ["response_id", "request_id", "trace_id", "session_id"])
def test_an_answer_can_be_named_in_four_ways(gateway: MakeGateway, fake: FakeVllm, name: str) -> None:
    gw = gateway(fake)
    answered(gw, **{"x-understudy-session": "s1"})
    fact = gw.interaction()
    about = {
        "response_id": ("response_id", fact.response_id),
        "request_id": ("response_id", fact.request_id),
        "trace_id": ("trace_id", fact.trace_id),
        "session_id": ("session_id", "s1"),
    }[name]
    assert gw.feedback({about[0]: about[1], "kind": "thumb", "value": False}).status_code == 202
    assert gw.sums()["champion"].n == 1.0
    assert gw.sums()["champion"].s == 0.0


# Counted once


def test_the_same_event_id_counts_once_and_the_last_one_counts(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    response_id, _ = answered(gw)
    gw.wait_interactions()
    for value in (True, True, False):
        gw.feedback({"response_id": response_id, "kind": "thumb", "value": value, "event_id": "e1"})
    sums = gw.sums()["champion"]
    assert (sums.n, sums.s) == (1.0, 0.0)
    assert len(gw.signals()) == 3, "all stay on record"


def test_one_subject_has_one_vote_of_a_kind_on_an_answer(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, reward={"signals": {"thumb": 0.25}})
    response_id, _ = answered(gw)
    gw.wait_interactions()
    for user in ("ann", "ann", "bob"):
        gw.feedback({"response_id": response_id, "kind": "thumb", "value": True, "user": user})
    sums = gw.sums()["champion"]
    assert (sums.n, sums.s) == (1.0, pytest.approx(0.5 + 0.5 * 0.5)), "ann once and bob once"


def test_a_vote_counts_once_however_the_answer_was_named(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, reward={"signals": {"thumb": 0.25}})
    response_id, token = answered(gw)
    fact = gw.interaction()
    gw.feedback({"response_id": response_id, "kind": "thumb", "value": True})
    gw.feedback({"response_id": fact.request_id, "kind": "thumb", "value": True})
    gw.feedback({"trace_id": fact.trace_id, "kind": "thumb", "value": True})
    gw.feedback({"kind": "thumb", "value": True}, x_understudy_feedback_token=token)  # no response_id is needed
    gw.feedback({"response_id": response_id, "kind": "thumb", "value": True}, x_understudy_feedback_token=token)
    assert gw.sums()["champion"].s == pytest.approx(0.5 + 0.5 * 0.25)


def test_a_session_contributes_once_however_many_of_its_answers_are_judged(
    gateway: MakeGateway, fake: FakeVllm
) -> None:
    gw = gateway(fake)
    for text, value in (("a", True), ("b", False), ("c", True), ("d", None)):
        response_id, _ = answered(gw, text, **{"x-understudy-session": "s1"})
        if value is not None:
            gw.feedback({"response_id": response_id, "kind": "thumb", "value": value})
    gw.wait_interactions(4)
    sums = gw.sums()["champion"]
    assert (sums.n, sums.s) == (1.0, pytest.approx(2 / 3)), "silence about the fourth is no zero"


@pytest.mark.parametrize("kind", ["status", "bad_json", "die_mid_body"])
def test_feedback_on_a_failed_answer_says_nothing_of_the_arm(gateway: MakeGateway, fake: FakeVllm, kind: Any) -> None:
    gw = gateway(fake)
    fake.script(Behaviour(kind))
    request_id = gw.chat().headers["x-request-id"]
    gw.wait_interactions()
    gw.feedback({"response_id": request_id, "kind": "thumb", "value": False})
    assert all(sums.n == 0 for sums in gw.sums().values())


# Who may speak


def test_a_token_speaks_for_its_answer_and_its_user(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    key = gw.key("acme")
    response_id, token = answered(gw, **bearer(key), **{"x-understudy-user": "ann"})
    fact = gw.interaction()
    said = gw.feedback({"response_id": response_id, "kind": "thumb", "value": True}, x_understudy_feedback_token=token)
    assert said.status_code == 202
    (signal,) = gw.signals("thumb")
    assert (signal.tenant, signal.response_id, signal.verified) == ("acme", fact.request_id, True)
    assert signal.subject == fact.user is not None
    assert gw.sums()["champion"].s == 1.0


def test_a_token_may_come_with_the_item(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    key = gw.key("acme")
    items = []
    for text in ("a", "b"):
        response_id, token = answered(gw, text, **bearer(key))
        items.append({"response_id": response_id, "kind": "copy", "token": token})
    items.append(items[0] | {"token": items[1]["token"]})
    said = gw.feedback(items).json()
    assert said["accepted"] == 2
    assert [(e["index"], e["status"]) for e in said["errors"]] == [(2, 403)]


def test_a_token_accepts_a_provider_made_answer_id_that_the_journal_knows(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    fake.script(named("foreign-1"), named("foreign-2"))
    tokens = [gw.chat(text, stream=True).headers[TOKEN] for text in ("a", "b")]
    stored = [f.response_id for f in gw.wait_interactions(2)]
    if stored != ["foreign-1", "foreign-2"]:
        pytest.skip("the fake cannot give a foreign id without SSE framing")
    item = {"response_id": "foreign-1", "kind": "copy"}
    assert gw.feedback(item, x_understudy_feedback_token=tokens[0]).status_code == 202
    assert gw.feedback(item, x_understudy_feedback_token=tokens[1]).status_code == 403


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize("how", ["junk", "empty parts", "changed", "re-signed", "other key id", "expired", "not ascii"])
def test_a_forged_or_expired_token_is_401(gateway: MakeGateway, fake: FakeVllm, how: str) -> None:
    gw = gateway(fake)
    response_id, token = answered(gw)
    fact = gw.interaction()
    payload, mac = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    forged = [*claims[:2], "someone-else", *claims[3:]]
    with gw.store() as store:
        secret = store.secret("tokens:0", b"")
    old = TokenSigner({"0": secret}).issue(fact.tenant, fact.request_id, None, time.time() - 8 * 86400)
    broken = {
        "junk": "junk",
        "empty parts": ".",
        "changed": f"{b64(json.dumps(forged).encode())}.{mac}",
        "re-signed": f"{payload}.{b64(hashlib.sha256(b'guess').digest()[:16])}",
        "other key id": TokenSigner({"7": secret}).issue(fact.tenant, fact.request_id, None, time.time()),
        "expired": old,
        "not ascii": "\xe9.\xe9",
    }[how]
    said = gw.http.post(
        "/v1/feedback",
        json={"response_id": response_id, "kind": "thumb", "value": True},
        headers=[(TOKEN.encode(), broken.encode("latin-1"))],
    )
    assert said.status_code == 401
    assert said.json()["error"]["type"] == "authentication_error"
    assert gw.signals() == []


@pytest.mark.parametrize("how", ["other answer", "other session", "outcome"])
def test_a_token_for_something_else_is_403(gateway: MakeGateway, fake: FakeVllm, how: str) -> None:
    gw = gateway(fake)
    mine, token = answered(gw, "a")
    other, _ = answered(gw, "b")
    session = gw.wait_interactions(2)[1].session
    item = {
        "other answer": {"response_id": other, "kind": "thumb", "value": False},
        "other session": {"session_id": session, "kind": "thumb", "value": False},
        "outcome": {"response_id": mine, "kind": "outcome", "name": "resolved", "value": 0},
    }[how]
    said = gw.feedback(item, x_understudy_feedback_token=token)
    assert said.status_code == 403
    assert said.json()["error"]["type"] == "permission_error"
    assert gw.signals() == []


def test_a_key_moves_no_other_tenants_answer(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    acme, beta = gw.key("acme"), gw.key("beta")
    response_id, _ = answered(gw, **bearer(acme), **{"x-understudy-session": "s1"})
    fact = gw.interaction()
    for about in (
        {"response_id": response_id},
        {"response_id": fact.request_id},
        {"trace_id": fact.trace_id},
        {"session_id": "s1"},
    ):
        assert gw.feedback(about | {"kind": "thumb", "value": False}, **bearer(beta)).status_code == 202
        assert gw.feedback(about | {"kind": "thumb", "value": False}).status_code == 202  # and without a key
    assert all(sums.n == 0 for sums in gw.sums().values())
    gw.feedback({"response_id": response_id, "kind": "thumb", "value": True}, **bearer(acme))
    assert gw.sums()["champion"].s == 1.0


@pytest.mark.parametrize("authorization", ["", "Bearer us-wrong", "Basic eA=="])
def test_with_require_key_feedback_needs_a_key_or_a_token(
    gateway: MakeGateway, fake: FakeVllm, authorization: str
) -> None:
    gw = gateway(fake, auth={"require_key": True})
    said = gw.feedback({"response_id": "x", "kind": "copy"}, authorization=authorization)
    assert said.status_code == 401
    assert said.json()["error"]["code"] == "invalid_api_key"
    assert gw.signals() == []


def test_tenants_whose_names_hold_a_slash_do_not_share_sessions(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    one, two = gw.key("a"), gw.key("a/b")
    for key, session, value in ((one, "b/c", True), (two, "c", False)):
        response_id, _ = answered(gw, **bearer(key), **{"x-understudy-session": session})
        gw.feedback({"response_id": response_id, "kind": "thumb", "value": value}, **bearer(key))
    gw.wait_interactions(2)
    assert gw.sums()["champion"].n == 2.0


def test_a_token_speaks_for_a_large_answer_at_once(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    for n in range(5):
        fake.script(named(f"gen-{n}"))
        said = gw.chat("long " * 100_000, stream=True)
        item = {"response_id": f"gen-{n}", "kind": "thumb", "value": True}
        told = gw.http.post("/v1/feedback", json=item, headers={TOKEN: said.headers[TOKEN]})
        assert told.status_code == 202, told.text


def test_while_the_journal_cannot_be_written_nothing_final_is_said_and_nobody_waits_long(
    gateway: MakeGateway, fake: FakeVllm
) -> None:
    gw = gateway(fake)
    known, _ = answered(gw)
    gw.wait_interactions(1)
    fake.script(named("gen-1"))
    with gw.journal() as journal:
        journal._db.execute("BEGIN IMMEDIATE")  # another program holds the file's lock
        said = gw.chat(stream=True)
        item = {"response_id": "gen-1", "kind": "comment", "text": "good"}
        told = gw.http.post("/v1/feedback", json=item, headers={TOKEN: said.headers[TOKEN]})
        assert (told.status_code, told.headers["retry-after"]) == (503, "1"), told.text
        began = time.monotonic()
        assert {gw.http.get(f"/v1/feedback/unknown-{n}").status_code for n in range(50)} == {503}
        assert gw.http.get(f"/v1/feedback/{known}").status_code == 200
        assert time.monotonic() - began < 5, "fifty half seconds"
        journal._db.execute("ROLLBACK")
    eventually(lambda: gw.http.post("/v1/feedback", json=item, headers={TOKEN: said.headers[TOKEN]}).is_success, 15)


def test_feedback_is_refused_while_the_journal_cannot_be_written_and_taken_after(
    gateway: MakeGateway, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JournalWriter, "PATIENCE", 0.3)
    gw = gateway(fake)
    with gw.journal() as journal:
        journal._db.execute("BEGIN IMMEDIATE")  # another program holds the file's lock
        said = gw.feedback({"response_id": "x", "kind": "copy"})
        assert said.status_code == 503
        assert said.headers["retry-after"] == "1"
        journal._db.execute("ROLLBACK")
    eventually(lambda: gw.feedback({"response_id": "y", "kind": "copy"}).status_code == 202, 15)
    assert "y" in [s.response_id for s in gw.signals()]
