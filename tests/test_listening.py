"""What the feedback endpoints say: summaries, who may read them, storms, and keys that are changed."""

from __future__ import annotations

import base64
import time
from typing import Any

import httpx
import msgspec
import pytest
from conftest import Gateway, MakeGateway, eventually
from fake_vllm import FakeVllm
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth import TokenSigner, live_keys, new_key
from gateway.limits import Allowance
from gateway.openai import ApiError
from telemetry.events import Signal

TOKEN = "x-understudy-feedback-token"


def answered(gw: Gateway, text: str = "hello", **headers: str) -> tuple[str, str]:
    """The id and the feedback token of a new, journaled answer."""
    before = len(gw.interactions())
    said = gw.chat(text, headers=headers)
    gw.interaction(before + 1)
    return said.json()["id"], said.headers[TOKEN]


def summary(gw: Gateway, name: str, query: str = "", **headers: str) -> httpx.Response:
    return gw.http.get(f"/v1/feedback/{name}{query}", headers=headers)


# What a summary says


def test_a_summary_counts_what_stands_and_shows_what_disagrees(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, reward={"window": "1s"})
    name, _ = answered(gw)
    assert summary(gw, name).json()["signals"] == []
    assert summary(gw, name).json()["reward"]["so_far"] is None, "silence is no evidence"
    for user, value in (("ann", True), ("bob", False), ("ann", True)):  # ann says it twice: once counts
        gw.feedback({"response_id": name, "kind": "thumb", "value": value, "user": user})
    assert summary(gw, name).json()["reward"]["so_far"] == 0.5
    gw.feedback({"response_id": name, "kind": "rating", "value": 5, "user": "cy"})
    found = summary(gw, name).json()
    counts = {row["kind"]: (row["count"], row["mean"]) for row in found["signals"]}
    assert counts == {"thumb": (2, 0.5), "rating": (1, 5.0)}
    assert found["replaced"] == 1
    assert {"kinds": ["thumb"], "good": 1, "bad": 1} in found["conflicts"]
    assert found["reward"]["so_far"] > 0.5
    assert found["response_id"] == name


def test_behaviour_waits_for_its_window_in_the_summary(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, reward={"window": "1s"})
    name, _ = answered(gw)
    gw.feedback({"response_id": name, "kind": "copy"})
    first = summary(gw, name).json()["reward"]
    assert (first["so_far"], first["waiting"]) == (None, 1)
    eventually(lambda: summary(gw, name).json()["reward"]["so_far"])
    assert summary(gw, name).json()["reward"]["waiting"] == 0


def test_a_summary_is_found_by_the_answers_id_and_by_our_request_id(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name, _ = answered(gw)
    gw.feedback({"response_id": name, "kind": "thumb", "value": True})
    request = gw.interaction().request_id
    assert summary(gw, request).json()["signals"] == summary(gw, name).json()["signals"] != []


@pytest.mark.parametrize("name", ["nothing", "", "a/b", "%00", "é" * 300, "..%2f..%2fetc"])
def test_an_answer_that_is_not_known_is_404(gateway: MakeGateway, fake: FakeVllm, name: str) -> None:
    said = summary(gateway(fake), name)
    assert said.status_code == 404
    assert said.json()["error"]["code"] == "not_found"


# Who may read it


def test_a_tenants_answers_are_not_there_for_another(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    acme, rival = f"Bearer {gw.key('acme')}", f"Bearer {gw.key('rival')}"
    name, token = answered(gw, authorization=acme)
    assert summary(gw, name, authorization=acme).status_code == 200
    assert summary(gw, name, authorization=rival).status_code == 404
    assert summary(gw, name).status_code == 401
    assert summary(gw, name, **{TOKEN: token}).status_code == 200
    other, _ = answered(gw, authorization=acme)
    assert summary(gw, other, **{TOKEN: token}).status_code == 403
    assert summary(gw, name, **{TOKEN: "junk"}).status_code == 401


def test_what_people_wrote_needs_a_key_of_its_own_and_leaves_a_record(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    plain = f"Bearer {gw.key('acme')}"
    name, token = answered(gw, authorization=plain)
    gw.feedback({"response_id": name, "kind": "comment", "text": "my cat ate it"}, authorization=plain)
    reader, kept = new_key("acme", "app", time.time(), text=True)
    with gw.store() as store:
        store.put_key(kept)
    assert "my cat" not in summary(gw, name, authorization=plain).text
    assert summary(gw, name, "?text=1", authorization=plain).status_code == 403
    assert summary(gw, name, "?text=1", **{TOKEN: token}).status_code == 403
    with gw.journal() as journal:
        assert journal.reads() == []
    may = f"Bearer {reader}"
    eventually(lambda: summary(gw, name, authorization=may).status_code == 200)
    assert "my cat ate it" in summary(gw, name, "?text=1", authorization=may).text
    with gw.journal() as journal:
        ((_, who, what),) = journal.reads()
    assert (who, gw.interaction().request_id in what) == (kept.id, True)


def test_a_token_of_another_tenant_than_the_key_is_refused_and_counted(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    acme, rival = f"Bearer {gw.key('acme')}", f"Bearer {gw.key('rival')}"
    name, token = answered(gw, authorization=acme)
    said = gw.http.post(
        "/v1/feedback",
        json={"response_id": name, "kind": "thumb", "value": True},
        headers={"authorization": rival, TOKEN: token},
    )
    assert said.status_code == 403
    assert gw.signals("thumb") == []
    assert 'understudy_feedback_refused_total{reason="forbidden"} 1.0' in gw.http.get("/metrics").text


# Pages of other origins


def test_a_page_of_any_origin_may_send_feedback(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    asked = gw.http.options(
        "/v1/feedback",
        headers={
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": f"content-type,{TOKEN}",
        },
    )
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == "*"
    assert TOKEN in asked.headers["access-control-allow-headers"]
    name, token = answered(gw)
    for body in ({"response_id": name, "kind": "copy"}, {"kind": "nonsense"}):
        said = gw.http.post("/v1/feedback", json=body, headers={TOKEN: token, "origin": "https://app.example"})
        assert said.headers["access-control-allow-origin"] == "*"
    assert summary(gw, name).headers["access-control-allow-origin"] == "*"


def test_what_sendbeacon_sends_is_taken(gateway: MakeGateway, fake: FakeVllm) -> None:
    """It can set no header: its body is text/plain, and the token stands in it."""
    gw = gateway(fake, auth={"require_key": True})
    name, token = answered(gw, authorization=f"Bearer {gw.key('acme')}")
    body = f'{{"response_id": "{name}", "kind": "dwell", "value": 3, "token": "{token}"}}'
    said = gw.http.post("/v1/feedback", content=body, headers={"content-type": "text/plain;charset=UTF-8"})
    assert said.status_code == 202
    assert gw.signals("dwell")[0].tenant == "acme"


# Storms


def test_a_storm_is_cut_off_for_whom_it_comes_from(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"feedback_per_minute": 3})
    name, _ = answered(gw)

    def copies(user: str) -> list[dict[str, Any]]:
        return [{"response_id": name, "kind": "copy", "user": user} for _ in range(5)]

    said = gw.feedback(copies("ann"))
    assert (said.status_code, said.json()["accepted"]) == (202, 3)
    assert [e["index"] for e in said.json()["errors"]] == [3, 4]
    assert 0 < int(said.headers["retry-after"]) <= 60
    refused = gw.feedback(copies("ann")[0])
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 0 < int(refused.headers["retry-after"]) <= 20
    assert gw.feedback(copies("bob")[0]).status_code == 202, "others are not held up"
    assert 'understudy_feedback_refused_total{reason="rate_limited"} 3.0' in gw.http.get("/metrics").text


@given(
    per_minute=st.floats(0.5, 1000),
    pauses=st.lists(st.floats(-10, 120), max_size=60),
)
def test_nobody_takes_more_than_is_allowed(per_minute: float, pauses: list[float]) -> None:
    allowance, now, taken, passed = Allowance(per_minute), 1000.0, 0, 0.0
    for pause in pauses:
        now += pause
        passed += max(0.0, pause)
        wait = allowance.take("ann", now)
        assert wait >= 0.0
        taken += wait == 0.0
    assert taken <= max(1.0, per_minute) + passed * per_minute / 60.0 + 1e-6


@given(per_minute=st.floats(1, 1000))
def test_after_the_wait_that_is_said_there_is_one(per_minute: float) -> None:
    allowance, now = Allowance(per_minute), 0.0
    while not (wait := allowance.take("ann", now)):
        pass
    assert allowance.take("bob", now) == 0.0
    assert allowance.take("ann", now + wait + 1e-6) == 0.0


# Keys of tokens


def test_a_new_key_signs_once_all_have_heard_of_it_and_the_last_still_verifies() -> None:
    old, both = {"100": b"a" * 32}, {"100": b"a" * 32, "1000": b"b" * 32}
    signer, late = TokenSigner(old), TokenSigner(old)
    first = signer.issue("t", "r", None, 1000.0)
    signer.refresh(both)
    assert late.verify(signer.issue("t", "r", None, 1001.0), 1001.0), "a worker that has not heard yet understands"
    late.refresh(both)
    new = signer.issue("t", "r", None, 1000.0 + TokenSigner.SETTLES)
    with pytest.raises(ApiError):
        TokenSigner(old).verify(new, 1100.0)
    assert late.verify(new, 1100.0).request_id == late.verify(first, 1100.0).request_id == "r"
    signer.refresh(both | {"2000": b"c" * 32})
    with pytest.raises(ApiError):
        signer.verify(first, 2100.0)
    assert live_keys(["9", "100", "20"]) == ["100", "20"]


def test_a_gateway_takes_up_a_new_key_without_a_restart(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name, token = answered(gw)
    body = {"response_id": name, "kind": "thumb", "value": True}
    made = int(time.time()) - TokenSigner.SETTLES
    with gw.store() as store:
        store.secret(f"tokens:{made}", b"n" * 32)
    newer = TokenSigner({str(made): b"n" * 32})
    eventually(lambda: _accepts(newer, answered(gw)[1]))
    assert gw.feedback(body, x_understudy_feedback_token=token).status_code == 202
    with gw.store() as store:
        store.secret(f"tokens:{made + 1}", b"m" * 32)
        store.drop_secret("tokens:0")
    eventually(lambda: gw.feedback(body, x_understudy_feedback_token=token).status_code == 401)


def _accepts(signer: TokenSigner, token: str) -> bool:
    try:
        return signer.verify(token, time.time()).kinds == ()
    except ApiError:
        return False


def test_a_store_that_was_emptied_gets_its_secrets_back(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name, token = answered(gw, **{"x-understudy-user": "ann"})
    with gw.store() as store:
        before = store.secrets()
        for secret in before:
            store.drop_secret(secret)
        eventually(lambda: store.secrets() == before)
    assert (
        gw.feedback(
            {"response_id": name, "kind": "thumb", "value": True}, x_understudy_feedback_token=token
        ).status_code
        == 202
    )
    answered(gw, **{"x-understudy-user": "ann"})
    one, two = gw.wait_interactions(2)
    assert one.user == two.user


# What is kept


def test_a_session_is_named_by_a_hash_everywhere_and_feedback_finds_it(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    answered(gw, **{"x-understudy-session": "ann@example.com"})
    gw.feedback({"session_id": "ann@example.com", "kind": "outcome", "value": {"name": "resolved", "value": 1}})
    (signal,) = gw.signals()
    assert signal.session == gw.interaction().session
    assert "ann@" not in repr((signal, gw.interaction()))


@pytest.mark.parametrize(
    ("capture", "route", "kept"),
    [
        ({"text": "full"}, None, "mail ann@example.com"),
        ({"text": "redacted"}, None, "mail [email]"),
        ({"text": "full"}, "redacted", "mail [email]"),
        ({"text": "full", "tenants": {"default": "off"}}, "redacted", None),
        ({"text": "off"}, "full", "mail ann@example.com"),
    ],
)
def test_the_stricter_of_route_and_tenant_says_what_of_a_comment_is_kept(
    gateway: MakeGateway, fake: FakeVllm, capture: dict[str, Any], route: str | None, kept: str | None
) -> None:
    gw = gateway(fake, capture=capture, **({"route": {"capture": route}} if route else {}))
    name, _ = answered(gw, "mail ann@example.com")
    gw.feedback({"response_id": name, "kind": "comment", "text": "mail ann@example.com"})
    assert gw.signals()[0].text == kept
    assert ("ann@example.com" in repr(gw.interaction())) == (kept == "mail ann@example.com")


@pytest.mark.parametrize("consent", ["none", "No", ""])
def test_without_consent_nothing_is_kept(gateway: MakeGateway, fake: FakeVllm, consent: str) -> None:
    gw = gateway(fake)
    said = gw.chat("my secret", metadata={"consent": consent})
    gw.feedback({"response_id": said.json()["id"], "kind": "comment", "text": "another secret"})
    assert "secret" not in repr(gw.interaction())


def test_a_comment_that_came_before_the_answer_that_may_not_be_kept_goes_with_it(
    gateway: MakeGateway, fake: FakeVllm
) -> None:
    gw = gateway(fake)
    said = gw.chat("hello", metadata={"consent": "none"})
    fact = gw.interaction()
    early = Signal(
        event_id="e", at=time.time(), kind="comment", tenant=fact.tenant, response_id="f" * 32, text="a secret of mine"
    )
    with gw.journal() as journal:
        journal.append([early])
        gw.settled()
        journal.append([msgspec.structs.replace(fact, event_id="late", request_id="f" * 32, response_id=None)])
    eventually(lambda: gw.signals("comment")[0].text is None)
    with gw.journal() as journal:
        eventually(journal.scrub)
    path = gw.settings.journal_path
    assert b"a secret of mine" not in b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))
    assert said.status_code == 200


def test_an_apps_own_event_id_is_a_hash_where_text_may_not_be_kept(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, capture={"text": "off"})
    item = {"response_id": answered(gw)[0], "kind": "thumb", "value": True, "event_id": "ann@example.com-1"}
    assert gw.feedback(item).json()["ids"] == gw.feedback(item).json()["ids"] == ["ann@example.com-1"]
    one, two = gw.signals()
    assert one.event_id == two.event_id
    assert "ann@" not in repr(one)


@pytest.mark.parametrize("prefix", ["chatcmpl-", "resp_", "cmpl-", ""])
def test_an_answer_may_be_named_by_any_id_that_ends_with_its_requests(
    gateway: MakeGateway, fake: FakeVllm, prefix: str
) -> None:
    gw = gateway(fake)
    answered(gw)
    name = f"{prefix}{gw.interaction().request_id}"
    gw.feedback({"response_id": name, "kind": "thumb", "value": True})
    assert gw.sums()["champion"].n == 1.0
    assert summary(gw, name).json()["signals"][0]["count"] == 1


@pytest.mark.parametrize(
    "payload", [b"[" * 1500, b"[" * 3000, b'{"a":' * 1000, b"\xff" * 100, b"[1e999]"], ids=lambda p: str(p[:8])
)
def test_a_hostile_token_is_401_and_nothing_else(gateway: MakeGateway, fake: FakeVllm, payload: bytes) -> None:
    gw = gateway(fake)
    name, _ = answered(gw)
    token = f"{base64.urlsafe_b64encode(payload).decode()}.AAAA"
    item = {"response_id": name, "kind": "thumb", "value": True}
    said = gw.feedback([item | {"token": token}, item])
    assert (said.status_code, said.json()["accepted"]) == (202, 1), "the good item is kept"
    assert said.json()["errors"][0]["status"] == 401
    assert summary(gw, name, **{TOKEN: token[:8000]}).status_code == 401


def test_behaviour_under_many_names_counts_once(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, reward={"window": "1s"})
    name, token = answered(gw)
    items = [{"response_id": name, "kind": "copy", "name": f"n{n}"} for n in range(10)]
    gw.feedback(items, x_understudy_feedback_token=token)
    found = eventually(lambda: r if (r := summary(gw, name).json()["reward"])["so_far"] else None)
    assert found["moved_by"] == {"copy": 1}


def test_what_names_an_answer_is_not_about_a_session_too(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name, _ = answered(gw, **{"x-understudy-session": "s1"})
    gw.feedback({"trace_id": "abc", "session_id": "s1", "kind": "thumb", "value": True})
    gw.feedback({"response_id": name, "session_id": "s1", "kind": "thumb", "value": False})
    assert [s.session for s in gw.signals()] == [None, None]
    answered(gw, "more", **{"x-understudy-session": "s1"})
    assert gw.sums()["champion"].s == 0.0
    assert summary(gw, name).status_code == 200


@pytest.mark.parametrize(("deep", "status"), [(20, 202), (40, 400), (900, 400), (5000, 400)])
def test_a_target_may_be_nested_but_not_without_end(
    gateway: MakeGateway, fake: FakeVllm, deep: int, status: int
) -> None:
    gw = gateway(fake)
    name, _ = answered(gw)
    body = f'{{"response_id": "{name}", "kind": "flag", "target": {"[" * deep}{"]" * deep}}}'
    assert gw.http.post("/v1/feedback", content=body).status_code == status
    gw.settled()


def test_a_comment_journaled_after_the_answer_that_may_not_be_kept_goes_as_well(
    gateway: MakeGateway, fake: FakeVllm
) -> None:
    gw = gateway(fake)
    gw.chat("hello", metadata={"consent": "none"})
    fact = gw.interaction()
    late = Signal("e", time.time(), "comment", fact.tenant, response_id=fact.request_id, text="a secret of mine")
    gw.settled()
    with gw.journal() as journal:
        journal.append([late])
    eventually(lambda: gw.signals("comment")[0].text is None)
