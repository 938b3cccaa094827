"""Rollouts as a gateway lives them: versions come and go, sessions move, replicas forget, and no request is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROUTE, MakeGateway, Publisher, ask, eventually, metric
from fake_vllm import DONE, Behaviour, FakeVllm, answer_text, error
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.arms import lineup
from router.arms import Choice, Snapshot
from router.bandit import draw
from router.policy import Arm, Reward
from router.reward import session_reward
from telemetry.events import Answerer, Interaction, Shadow, Signal
from telemetry.journal import Journal
from understudy.demo.story import gateway as serving
from understudy.demo.vllm_server import VllmServer, free_port

CANARY = {"versions": ("v2",), "rollout": "r1", "challenger": "v2", "control": "champion"}
GRID = 2000


def session(name: str) -> dict[str, str]:
    return {"x-understudy-session": name}


def second(text: str) -> list[dict[str, str]]:
    """The messages of a conversation's second turn."""
    return [*ask()["messages"], {"role": "assistant", "content": "x"}, {"role": "user", "content": text}]


# Drawing


weights_of = st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1)), min_size=2, max_size=5).filter(any)


@settings(max_examples=100, deadline=None)
@given(raw=weights_of, holdout=st.sampled_from([0.0, 0.05, 0.5, 1.0]), place=st.integers(0, 4))
def test_the_holdout_is_drawn_evenly_over_all_arms_but_the_challenger(
    raw: list[float], holdout: float, place: int
) -> None:
    weights = {f"a{n}": weight / sum(raw) for n, weight in enumerate(raw)}
    challenger, control = f"a{place % len(raw)}", f"a{(place + 1) % len(raw)}"
    snapshot = Snapshot(
        "r", 1, 0.0, "thompson", holdout, {"": weights}, rollout="x", challenger=challenger, control=control
    )
    choices = [draw(snapshot, (at + 0.5) / GRID) for at in range(GRID)]
    even = holdout / (len(weights) - 1)
    exact = {arm: (arm != challenger) * even + (1 - holdout) * weight for arm, weight in weights.items()}
    drawn = Counter(choice.arm for choice in choices)
    assert sum(exact.values()) == pytest.approx(1.0)
    for arm, propensity in exact.items():
        assert drawn[arm] / GRID == pytest.approx(propensity, abs=2 / GRID + 1e-9)
    both = weights[challenger] > 0 and weights[control] > 0
    other = {challenger: control, control: challenger}
    for choice in choices:
        assert choice.propensity == pytest.approx(exact[choice.arm])
        assert not (choice.holdout and choice.arm == challenger)
        takes_part = both and choice.arm in other
        assert choice.rollout == ("x" if takes_part else "")
        assert choice.rival == (pytest.approx(exact[other[choice.arm]]) if takes_part else 0.0)


def test_a_challenger_that_has_all_the_weight_leaves_no_arm_for_the_holdout_but_itself() -> None:
    snapshot = Snapshot("r", 1, 0.0, "thompson", 0.1, {"": {"v2": 1.0}}, rollout="x", challenger="v2", control="v1")
    for u in (0.05, 0.5):
        choice = draw(snapshot, u)
        assert (choice.arm, choice.rollout) == ("v2", "")
        assert choice.propensity == pytest.approx(1.0)


def test_an_answer_by_a_stand_in_is_no_evidence() -> None:
    def answer(name: str, arm: str, policy: str) -> Interaction:
        return Interaction(name, 0.0, name, ROUTE, "t", "s", Answerer(arm, arm, policy=policy))

    answers = [answer("one", "v2", "thompson"), answer("two", "champion", "fallback")]
    down = Signal("e", 1.0, "thumb", "t", response_id="two", value=0.0, verified=True)
    up = Signal("f", 1.0, "thumb", "t", response_id="one", value=1.0, verified=True)
    assert session_reward(answers, [(1, down)], Reward()) is None
    found = session_reward(answers[::-1], [(1, down), (2, up)], Reward())
    assert found is not None
    assert (found.arm, found.reward) == ("v2", 1.0)


# Lineups


CONFIG = {
    "champion": Arm(model="base", system="Be brief.", params={"temperature": 0.2}),
    "far": Arm(model="gpt", provider="openai", api_key="k"),
}


def snapshot(weights: dict[str, float], **fields: Any) -> Snapshot:
    return Snapshot(ROUTE, 1, 0.0, "thompson", 0.0, {"": weights}, **fields)


def test_a_version_is_dressed_as_the_arm_whose_place_it_may_take() -> None:
    found = lineup(CONFIG, snapshot({"v2": 1.0}, lead="champion", versions=("v1", "v2"))).arms["v2"]
    assert (found.model, found.system, dict(found.params)) == ("v2", "Be brief.", {"temperature": 0.2})
    far = lineup(CONFIG, snapshot({"v2": 1.0}, lead="far", versions=("v2",))).arms["v2"]
    assert (far.model, far.provider, far.api_key) == ("v2", None, None), "it is served by the route's own replicas"


def test_an_arm_is_held_if_it_has_a_place_in_the_weights_or_is_kept() -> None:
    found = lineup(CONFIG, snapshot({"v2": 1.0}, lead="champion", versions=("v1", "v2", "v3"), kept=("v1",)))
    assert found.held == {"v1", "v2"}


def test_stand_ins_are_the_control_then_who_is_kept_then_the_lead_then_any() -> None:
    versions = ("v1", "v2", "v3", "v4")
    tried = snapshot(
        {"far": 0.1, "v2": 0.1, "v3": 0.8},
        lead="champion", versions=versions, kept=("v1",), rollout="r", challenger="v2", control="v3",
    )  # fmt: skip
    assert lineup(CONFIG, tried).stand_ins == ("v3", "v1", "champion", "far")
    calm = snapshot({"far": 0.2, "v4": 0.8}, lead="champion", versions=versions, kept=("v1",))
    assert lineup(CONFIG, calm).stand_ins == ("v4", "v1", "champion", "far")
    assert list(lineup(CONFIG, calm).in_turn(Choice("v1", 1.0))) == ["v1", "v4", "champion", "far"]
    assert list(lineup(CONFIG, calm).in_turn(Choice("v1", 1.0, policy="pinned"))) == ["v1"]


# Versions


def test_a_version_answers_dressed_as_its_lead_and_its_fact_says_what_rollout_it_was(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v2")
    arms = {"champion": {"model": "base", "system": "Be brief.", "params": {"max_tokens": 4}}}
    gw = gateway(fake, arms=arms, state=publisher.state)
    publisher.show(gw, {"champion": 0.75, "v2": 0.25}, **CANARY, holdout=0.2)
    for n in range(40):
        assert gw.chat(headers=session(f"s{n}")).status_code == 200
    facts = gw.wait_interactions(40)
    assert {f.answerer.arm for f in facts} == {"champion", "v2"}
    for fact in facts:
        by = fact.answerer
        challenger = by.arm == "v2"
        assert by.model == ("v2" if challenger else "base")
        assert (by.rollout, by.policy, fact.error) == ("r1", "thompson", None)
        expected = (0.2, 0.8) if challenger else (0.8, 0.2)
        assert (by.propensity, by.rival) == pytest.approx(expected)
    for request in fake.asked("v2"):
        assert request.json["messages"][0] == {"role": "system", "content": "Be brief."}
        assert request.json["max_tokens"] == 4


def test_admins_see_and_pin_versions(gateway: MakeGateway, fake: FakeVllm, publisher: Publisher) -> None:
    fake.load("v2")
    gw = gateway(fake, state=publisher.state)
    publisher.show(gw, {"champion": 1.0}, **CANARY, shadow=0.1)
    admin = gw.client(gw.key("acme", "admin"))
    assert [m.id for m in admin.models.list()] == [ROUTE, f"{ROUTE}:champion", f"{ROUTE}:v2"]
    assert admin.chat.completions.create(**ask() | {"model": f"{ROUTE}:v2"}).model == "v2"
    by = gw.interaction().answerer
    assert (by.arm, by.policy, by.rollout) == ("v2", "pinned", "")
    assert gw.chat(model=f"{ROUTE}:v2").status_code == 404


def test_a_pinned_arm_that_is_loaded_nowhere_is_not_answered_by_another(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    gw = gateway(fake, state=publisher.state)
    publisher.show(gw, {"champion": 1.0}, **CANARY, shadow=0.1)
    bearer = {"authorization": f"Bearer {gw.key('acme', 'admin')}"}
    said = gw.chat(model=f"{ROUTE}:v2", headers=bearer)
    assert (said.status_code, said.json()["error"]["code"]) == (503, "upstream_error")
    assert "serves v2" in said.json()["error"]["message"]
    fact = gw.interaction()
    assert (fact.answerer.arm, fact.answerer.policy, fact.error, fact.status) == ("v2", "pinned", "upstream_error", 503)
    assert fact.request_id == said.headers["x-request-id"] != ""


def test_versions_of_an_unknown_lead_lose_no_request(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v2")
    gw = gateway(fake, state=publisher.state)
    publisher.show(gw, {"v2": 0.5, "removed": 0.5}, lead="gone", versions=("v2",))
    for n in range(8):
        assert gw.chat("x", headers=session(f"s{n}")).json()["model"] == "base"
    assert {(f.answerer.arm, f.answerer.policy) for f in gw.wait_interactions(8)} == {("champion", "fallback")}


# Rolling back


def test_a_rollback_under_200_streams_cuts_none_and_sends_sessions_away_at_their_next_request(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v2")
    gw = gateway(fake, state=publisher.state, timeouts={"idle": "30s", "first_byte": "30s"}, policy={"refresh": "10m"})
    publisher.show(gw, {"champion": 0.5, "v2": 0.5}, **CANARY)
    fake.script(Behaviour("hang_mid_stream", n=200))

    async def stream(client: httpx.AsyncClient, n: int) -> tuple[int, bytes]:
        body = ask(f"q{n}", stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=session(f"s{n}")) as said:
            return said.status_code, await said.aread()

    async def all_of_them() -> list[tuple[int, bytes]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=gw.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(stream(client, n) for n in range(200)))

    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(asyncio.run, all_of_them())
        eventually(lambda: fake.hanging == 200, 20)
        on_v2 = [r.json["messages"][0]["content"][1:] for r in fake.asked("v2")]
        assert 60 < len(on_v2) < 140
        publisher.publish({"champion": 1.0})
        time.sleep(2.0)
        new = [gw.chat("x", headers=session(f"new{n}")).json()["model"] for n in range(30)]
        assert set(new) == {"base"}
        moved = [gw.chat(headers=session(f"s{n}"), messages=second("y")).json()["model"] for n in on_v2[:20]]
        assert set(moved) == {"base"}
        assert fake.hanging == 200, "what was running goes on"
        fake.release()
        ended = streams.result(60)
    for n, (status, body) in enumerate(ended):
        assert status == 200
        assert body.endswith(DONE)
        said = "v2" if str(n) in on_v2 else "base"
        assert f'"model":"{said}"'.encode() in body
    facts = gw.wait_interactions(250)
    assert {f.error for f in facts} == {None}
    for fact in facts:
        if fact.stream:
            asked = fact.messages[0]["content"]
            assert fact.answer == answer_text(fact.answerer.model, asked)
    again = [f for f in facts if f.turn == 1]
    assert {(f.answerer.arm, f.answerer.recalled, f.answerer.rollout) for f in again} == {("champion", False, "")}


def test_sessions_of_a_kept_arm_stay_and_no_new_one_comes(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v1")
    fake.load("v2")
    gw = gateway(fake, state=publisher.state)
    publisher.show(gw, {"v1": 1.0}, versions=("v1",))
    for n in range(5):
        gw.chat(headers=session(f"s{n}"))
    publisher.show(gw, {"v2": 1.0}, versions=("v1", "v2"), kept=("v1",))
    for n in range(10):
        body = gw.chat(headers=session(f"s{n}"), messages=second("y")).json()
        assert body["model"] == ("v1" if n < 5 else "v2")
    assert [f.answerer.recalled for f in gw.wait_interactions(15)[5:]] == [True] * 5 + [False] * 5


def test_a_worker_that_starts_after_the_rollback_recalls_nobody_to_the_challenger(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v2")
    one = gateway(fake, state=publisher.state)
    publisher.show(one, {"champion": 0.5, "v2": 0.5}, **CANARY)
    sessions = [f"s{n}" for n in range(12)]
    drawn = {s: one.chat(headers=session(s)).json()["model"] for s in sessions}
    assert set(drawn.values()) == {"base", "v2"}
    one.stop()
    publisher.publish({"champion": 1.0})
    two = gateway(fake, state=publisher.state)
    already = len(two.interactions())
    for s in sessions:
        assert two.chat(headers=session(s), messages=second("y")).json()["model"] == "base"
    recalled = {f.session: f.answerer.recalled for f in two.wait_interactions(already + 12)[already:]}
    assert sorted(recalled.values()) == sorted(model == "base" for model in drawn.values())


# Replicas that forget


@pytest.fixture
def pair() -> Iterator[tuple[FakeVllm, FakeVllm]]:
    with FakeVllm(["base"]) as one, FakeVllm(["base"]) as two:
        one.load("v2")
        two.load("v2")
        yield one, two


def test_a_replica_that_restarted_without_the_version_is_asked_for_it_again_once_it_serves_it(
    gateway: MakeGateway, pair: tuple[FakeVllm, FakeVllm], publisher: Publisher
) -> None:
    one, two = pair
    gw = gateway(one, two, state=publisher.state)
    publisher.show(gw, {"v2": 1.0}, versions=("v2",))
    sessions = [f"s{n}" for n in range(20)]
    served = {s: gw.chat(s, headers=session(s)).json()["model"] for s in sessions}
    assert set(served.values()) == {"v2"}
    assert one.asked()
    assert two.asked()
    one.restart()
    before = len(one.asked("base")), len(two.asked("v2"))
    for s in sessions:
        said = gw.chat(headers=session(s), messages=second(s))
        assert (said.status_code, said.json()["model"]) == (200, "v2")
    assert (len(one.asked("base")), len(two.asked("v2"))) == (before[0], before[1] + 20), "the other one serves it"
    assert metric(gw, "understudy_fallbacks_total") == 0
    one.load("v2")
    had = len(one.asked("v2"))

    def reached() -> bool:
        assert {gw.chat(headers=session(s), messages=second(s)).json()["model"] for s in sessions} == {"v2"}
        return len(one.asked("v2")) > had

    eventually(reached)
    assert {f.error for f in gw.wait_interactions(60)} == {None}


@pytest.mark.parametrize("stream", [False, True])
def test_while_no_replica_serves_the_version_the_champion_stands_in_and_is_counted(
    gateway: MakeGateway, pair: tuple[FakeVllm, FakeVllm], publisher: Publisher, stream: bool
) -> None:
    one, two = pair
    gw = gateway(one, two, state=publisher.state)
    publisher.show(gw, {"champion": 0.0001, "v2": 0.9999}, **CANARY)
    assert gw.chat(headers=session("s")).json()["model"] == "v2"
    for replica in pair:
        replica.forget("v2")
    said = [gw.chat(f"q{n}", headers=session(f"s{n}"), stream=stream) for n in range(10)]
    assert {s.status_code for s in said} == {200}
    assert metric(gw, "understudy_fallbacks_total", route=ROUTE, arm="v2") == 10
    for n, fact in enumerate(gw.wait_interactions(11)[1:]):
        by = fact.answerer
        assert (by.arm, by.model, by.policy) == ("champion", "base", "fallback")
        assert (by.recalled, by.rollout, by.rival, by.holdout) == (False, "", 0.0, False)
        assert (fact.error, fact.answer) == (None, answer_text("base", f"q{n}"))
    assert len(one.asked("v2")) + len(two.asked("v2")) <= 1 + 2, "each says once that it has it no more"
    assert gw.chat(headers=session("s"), messages=second("y")).json()["model"] == "base"
    assert not gw.interaction(12).answerer.recalled, "the session had another arm"
    for replica in pair:
        replica.load("v2")
    eventually(lambda: gw.chat(headers=session("s0"), messages=second("y")).json()["model"] == "v2")
    eventually(lambda: gw.interactions()[-1].answerer.arm == "v2")
    by = gw.interactions()[-1].answerer
    assert (by.recalled, by.policy, by.rollout) == (True, "thompson", "r1"), "the session's assignment stayed"


def test_a_session_for_which_the_champion_stood_in_keeps_its_draw_at_another_worker(
    gateway: MakeGateway, pair: tuple[FakeVllm, FakeVllm], publisher: Publisher
) -> None:
    one, two = (gateway(*pair, state=publisher.state) for _ in range(2))
    for gw in (one, two):
        publisher.show(gw, {"champion": 0.0001, "v2": 0.9999}, **CANARY)
    for replica in pair:
        replica.forget("v2")
    assert one.chat(headers=session("s")).json()["model"] == "base"
    for replica in pair:
        replica.load("v2")
    publisher.show(one, {"champion": 0.9999, "v2": 0.0001}, **CANARY)
    publisher.show(two, {"champion": 0.9999, "v2": 0.0001}, **CANARY)
    eventually(lambda: two.chat(headers=session("s"), messages=second("y")).json()["model"] == "v2")


def test_no_request_of_many_at_once_fails_while_replicas_forget_and_load_in_turn(
    gateway: MakeGateway, pair: tuple[FakeVllm, FakeVllm], publisher: Publisher
) -> None:
    gw = gateway(*pair, state=publisher.state)
    publisher.show(gw, {"champion": 0.5, "v2": 0.5}, **CANARY)
    stopping = threading.Event()

    def live(number: int) -> list[int]:
        said, n = [], 0
        with httpx.Client(base_url=gw.url, timeout=20) as client:
            while not stopping.is_set():
                body, who = ask("x", stream=n % 2 == 0), session(f"{number}-{n % 20}")
                answer = client.post("/v1/chat/completions", json=body, headers=who)
                said.append(answer.status_code if b'"error"' not in answer.content else 0)
                n += 1
        return said

    with ThreadPoolExecutor(4) as pool:
        living = [pool.submit(live, number) for number in range(4)]
        for replica in (*pair, *pair):
            replica.forget("v2")
            time.sleep(0.4)
        for replica in pair:
            replica.load("v2")
        time.sleep(0.3)
        stopping.set()
        codes = Counter(code for one in living for code in one.result(20))
    assert set(codes) == {200}
    assert codes[200] > 100
    assert metric(gw, "understudy_fallbacks_total") > 0


def test_a_replica_that_is_away_leaves_the_version_to_a_stand_in_elsewhere(
    gateway: MakeGateway, pair: tuple[FakeVllm, FakeVllm], publisher: Publisher
) -> None:
    one, two = pair
    two.forget("v2")
    gw = gateway(one, two, state=publisher.state)
    publisher.show(gw, {"v2": 1.0}, versions=("v2",))
    for n in range(10):
        assert gw.chat(headers=session(f"s{n}")).json()["model"] == "v2"
    one.stop()
    for n in range(10):
        said = gw.chat(headers=session(f"s{n}"), messages=second("y"))
        assert (said.status_code, said.json()["model"]) == (200, "base")
    one.start()
    eventually(lambda: gw.chat(headers=session("s0"), messages=second("y")).json()["model"] == "v2")


def test_an_arm_of_the_config_that_is_served_nowhere_has_a_stand_in_too(gateway: MakeGateway, fake: FakeVllm) -> None:
    arms = {"good": {"model": "good"}, "lost": {"model": "lost"}}
    gw = gateway(fake, arms=arms, policy={"kind": "split", "shares": {"lost": 1.0}})
    assert gw.chat().json()["model"] == "good"
    assert gw.interaction().answerer.policy == "fallback"
    fake.load("lost")
    eventually(lambda: gw.chat().json()["model"] == "lost")


def test_where_nothing_is_served_the_client_hears_that_and_no_404(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms={"champion": {"model": "lost"}})
    for _ in range(2):
        said = gw.chat()
        assert (said.status_code, said.json()["error"]["code"]) == (503, "upstream_error")
    assert [(f.error, f.status, f.answerer.policy) for f in gw.wait_interactions(2)] == [
        ("upstream_error", 503, "thompson")
    ] * 2
    assert metric(gw, "understudy_fallbacks_total") == 0


def test_a_404_that_is_not_of_the_model_is_the_clients(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    body = error("Response with id 'resp_x' not found.", "invalid_request_error", 404, "response_id")
    fake.script(Behaviour("status", status=404, body=body))
    said = gw.http.post("/v1/responses", json={"model": ROUTE, "input": "x", "previous_response_id": "resp_x"})
    assert (said.status_code, said.json()) == (404, body)


def test_an_upstream_without_a_list_of_models_is_asked_again(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.script(Behaviour("status", path="/v1/models", status=404, n=None))
    gw = gateway(fake, state=publisher.state)
    publisher.show(gw, {"v2": 1.0}, versions=("v2",))
    assert gw.chat().json()["model"] == "base"
    fake.load("v2")
    eventually(lambda: gw.chat().json()["model"] == "v2")


def test_what_replicas_serve_is_not_asked_where_no_version_is(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    time.sleep(0.6)
    gw.chat()
    assert [r.path for r in fake.requests] == ["/v1/chat/completions"]


@pytest.mark.vllm
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_real_vllm_says_of_a_version_that_it_has_it_not_and_answers_copies(
    gateway: MakeGateway, vllm: VllmServer, publisher: Publisher, path: str, stream: bool
) -> None:
    gw = gateway(vllm.url, state=publisher.state, timeouts={"first_byte": "60s", "idle": "60s"})
    fields = CANARY | {"versions": ("ghost", "careful"), "challenger": "careful"}
    publisher.show(gw, {"ghost": 1.0}, **fields, shadow=1.0)
    said = {"messages": ask("hello")["messages"]} if "chat" in path else {"prompt": "hello"}
    body = {"input": "hello", "max_output_tokens": 4} if path == "responses" else said | {"max_tokens": 4}
    for _ in range(2):
        answer = gw.http.post(f"/v1/{path}", json={"model": ROUTE, "stream": stream} | body, timeout=120)
        assert answer.status_code == 200, answer.text
    for fact in gw.wait_interactions(2):
        assert (fact.error, fact.answerer.arm, fact.answerer.policy) == (None, "champion", "fallback")
    copies = eventually(lambda: found if len(found := gw.shadows()) == 2 else [], 60)
    assert [(copy.error, copy.model) for copy in copies] == [(None, "careful")] * 2
    assert all(0 < (copy.tokens_out or 0) <= 4 for copy in copies)


# Two workers


@contextmanager
def house(folder: Path, publisher: Publisher, fake: FakeVllm) -> Iterator[str]:
    """`understudy serve` with two workers; its URL."""
    port = free_port()
    config = folder / "understudy.yaml"
    config.write_text(
        f"listen: {{port: {port}, workers: 2}}\nstate: {publisher.state}\njournal: {folder}/journal.db\n"
        f"routes:\n  {ROUTE}:\n    upstreams: ['{fake.url}']\n"
        "    arms: {champion: {model: base}}\n    policy: {kind: thompson, refresh: 30s}\n"
    )
    with serving(config, f"http://127.0.0.1:{port}", folder / "log"):
        yield f"http://127.0.0.1:{port}"


def test_two_workers_follow_a_rollback_and_copy_for_the_shadow(
    publisher: Publisher, fake: FakeVllm, tmp_path: Path
) -> None:
    fake.load("v2")
    publisher.publish({"champion": 0.5, "v2": 0.5}, **CANARY)

    def models(url: str, **fields: Any) -> dict[str, str]:
        """Who answers each session; each request has a connection of its own, so either worker may take it."""
        found = {}
        with httpx.Client(base_url=url, timeout=20, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            for name in (f"s{n}" for n in range(40)):
                said = client.post("/v1/chat/completions", json=ask(**fields), headers=session(name))
                assert said.status_code == 200
                found[name] = said.json()["model"]
        return found

    with house(tmp_path, publisher, fake) as url:
        first = models(url)
        assert set(first.values()) == {"base", "v2"}
        assert models(url, messages=second("y")) == first, "whichever worker is asked"
        publisher.publish(
            {"champion": 1.0}, versions=("v2",), rollout="r2", challenger="v2", control="champion", shadow=1.0
        )
        time.sleep(2.0)
        had = len(fake.asked("v2"))
        assert set(models(url, messages=second("z")).values()) == {"base"}
        eventually(lambda: len(fake.asked("v2")) == had + 40, 10)
    journal = Journal(tmp_path / "journal.db")
    facts = [fact for _, fact in journal.read(0, 1000)]
    journal.close()
    assert Counter(type(fact) for fact in facts) == {Interaction: 120, Shadow: 40}
    last = {fact.request_id for fact in facts[80:] if isinstance(fact, Interaction)}
    assert {fact.of for fact in facts if isinstance(fact, Shadow)} == last
