"""A person in a real browser: what they do with an answer arrives, joined to the arm that gave it."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Gateway, MakeGateway, eventually
from fake_vllm import Behaviour, FakeVllm
from planted_rollout import config, plant, served
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from telemetry.events import Signal

SDK = Path(__file__).parents[1] / "sdk" / "js"
PATIENCE = 10.0
"""Seconds; where nothing else runs, what is done arrives within 2."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "Chromium is needed: `make test` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))

    def say(said: ConsoleMessage) -> None:
        if said.type == "error" and "Failed to load resource" not in said.text:  # a status is no fault of the page's
            problems.append(said.text)

    page.on("console", say)
    yield page
    context.close()
    assert problems == []


def heard(gw: Gateway, kind: str, n: int = 1) -> list[Signal]:
    """The signals of a kind, once there are `n`, soon."""
    return eventually(lambda: found if len(found := gw.signals(kind)) >= n else [], PATIENCE)


def ask(page: Page, gw: Gateway, text: str) -> Any:
    """The place of the answer, once it is whole."""
    if not page.url.startswith(gw.url):
        page.goto(f"{gw.url}/ui/try")
        expect(page.locator("#route option")).not_to_have_count(0)
    before = page.locator(".answer").count()
    page.fill("#text", text)
    page.keyboard.press("Enter")
    expect(page.locator("#ask button")).to_be_enabled()
    answer = page.locator(".answer").nth(before)
    expect(answer.locator(".text")).not_to_be_empty()
    return answer


def select(page: Page, place: Any, share: float) -> str:
    """Select the first `share` of an answer's text, as a mouse would; what was selected."""
    return str(
        place.evaluate(
            """(element, share) => {
                const node = element.firstChild;
                const range = document.createRange();
                range.setStart(node, 0);
                range.setEnd(node, Math.round(node.length * share));
                getSelection().removeAllRanges();
                getSelection().addRange(range);
                return range.toString();
            }""",
            share,
        )
    )


def test_a_person_copies_half_edits_votes_and_closes_the_tab(gateway: MakeGateway, fake: FakeVllm, page: Page) -> None:
    gw = gateway(fake, arms={"one": {"model": "good"}, "two": {"model": "bad"}}, auth={"require_key": False})
    answer = ask(page, gw, "hello there")
    place = answer.locator(".text")
    whole = place.inner_text()
    fact = gw.interaction()

    half = select(page, place, 0.5)
    page.keyboard.press("Control+c")
    (copy,) = heard(gw, "copy")
    assert copy.value == pytest.approx(len(half.strip()) / len(whole), abs=0.05)
    assert copy.target == "part"

    answer.locator("[data-do=edit]").click()
    place.press("End")
    page.keyboard.type(" and more")
    answer.locator("[data-do=down]").click()
    (thumb,) = heard(gw, "thumb")
    assert thumb.value == 0.0
    (first,) = heard(gw, "first_action")
    assert first.value is not None
    assert first.value > 0

    page.close(run_before_unload=False)
    (dwell,) = heard(gw, "dwell")
    assert dwell.value is not None
    assert 0.1 < dwell.value < 60
    (edit,) = heard(gw, "edit")
    assert edit.text == f"{whole} and more"
    assert edit.value == pytest.approx(len(whole) / len(f"{whole} and more"), abs=0.02)
    for signal in (copy, thumb, first, dwell, edit):
        with gw.journal() as journal:
            ((_, joined),) = journal.answers(signal)
        assert (joined.request_id, joined.answerer.arm) == (fact.request_id, fact.answerer.arm)
        assert (signal.source, signal.verified, signal.subject) == ("token", True, fact.user)


def test_an_edit_is_looked_at_again_and_an_undone_one_counts_no_more(
    gateway: MakeGateway, fake: FakeVllm, page: Page
) -> None:
    gw = gateway(fake)
    page.clock.install()
    answer = ask(page, gw, "hello")
    place = answer.locator(".text")
    answer.locator("[data-do=edit]").click()
    place.press("End")
    page.keyboard.type("!!")
    page.clock.run_for(6000)
    assert heard(gw, "edit")[0].value < 1.0  # type: ignore[operator]
    page.keyboard.press("Backspace")
    page.keyboard.press("Backspace")
    page.clock.run_for(30_000)
    first, second = heard(gw, "edit", 2)
    assert [first.target, second.target] == [{"after": 5}, {"after": 30}]
    assert second.value == 1.0


def test_a_code_block_the_whole_and_nothing_of_it(gateway: MakeGateway, fake: FakeVllm, page: Page) -> None:
    gw = gateway(fake)
    name, token = said(gw)
    page.goto(f"{gw.url}/ui/try")
    observed(page, name, token, "<p>Look:</p><pre><code>print(1)</code></pre><p>done and done</p>")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#shown code'))")
    page.evaluate("document.execCommand('copy')")
    assert heard(gw, "copy")[0].target == "code"
    page.evaluate("getSelection().selectAllChildren(document.body)")
    page.evaluate("document.execCommand('copy')")
    copy = heard(gw, "copy", 2)[1]
    assert (copy.target, copy.value) == ("whole", 1.0)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
    page.evaluate("document.execCommand('copy')")
    page.evaluate("window.answer.rate(4)")
    heard(gw, "rating")
    assert len(gw.signals("copy")) == 2, "what is copied elsewhere is nobody's business"


def test_everything_that_can_be_said_is_taken(gateway: MakeGateway, fake: FakeVllm, page: Page) -> None:
    gw = gateway(fake)
    _, token = said(gw)
    page.goto(f"{gw.url}/ui/try")
    observed(page, None, token, "text")
    page.evaluate(
        """async () => {
            const { answer } = window;
            answer.thumb(true); answer.rate(4); answer.correct("better"); answer.compare("a", "b");
            answer.copied(); answer.accept(); answer.send("comment", { text: "né \\u0000 🙂" });
            const loop = {}; loop.loop = loop;
            answer.send("flag", { target: loop });  // cannot be sent, and is nobody's problem
        }"""
    )
    heard(gw, "comment")
    kinds = {s.kind: s for s in gw.signals()}
    assert set(kinds) == {"thumb", "rating", "correction", "comparison", "copy", "accept", "comment"}
    assert {s.response_id for s in kinds.values()} == {gw.interaction().request_id}, "a token alone names its answer"
    assert kinds["comment"].text == "né \x00 🙂"


def test_what_was_said_while_the_gateway_was_busy_arrives_later_and_once(
    gateway: MakeGateway, fake: FakeVllm, page: Page
) -> None:
    gw = gateway(fake)
    name, token = said(gw)
    page.goto(f"{gw.url}/ui/try")
    left = [503, 429]

    def busy(route: Any) -> None:
        status = left.pop(0) if left else None
        route.fulfill(status=status) if status else route.continue_()

    page.route("**/v1/feedback", busy)
    observed(page, name, token, "text")
    page.evaluate("window.answer.thumb(true)")
    (thumb,) = eventually(lambda: page.evaluate("0") or gw.signals("thumb"), 10)  # the page's routes run in between
    assert left == []
    assert thumb.response_id == gw.interaction().request_id


def test_an_answer_that_fails_says_why_and_is_not_observed(
    gateway: MakeGateway, fake: FakeVllm, chromium: Browser
) -> None:
    gw = gateway(fake)
    page = chromium.new_page()
    fake.script(Behaviour("status", status=500, body={"error": {"message": "out of order"}}))
    page.goto(f"{gw.url}/ui/try")
    expect(page.locator("#route option")).to_have_count(1)
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .error")).to_contain_text("out of order")
    page.close()


def test_the_page_tells_what_was_heard(gateway: MakeGateway, fake: FakeVllm, page: Page) -> None:
    gw = gateway(fake)
    ask(page, gw, "hello").locator("[data-do=up]").click()
    expect(page.locator("#heard")).to_contain_text("thumb")
    expect(page.locator("#heard")).to_contain_text("reward so far 1.00")


def test_asking_again_is_heard_as_a_regeneration(gateway: MakeGateway, fake: FakeVllm, page: Page) -> None:
    gw = gateway(fake)
    ask(page, gw, "hello").locator("[data-do=again]").click()
    expect(page.locator(".answer")).to_have_count(2)
    (signal,) = eventually(lambda: gw.signals("regenerate"))
    assert signal.response_id == gw.interaction().request_id


def test_the_pages_can_be_turned_off_and_nothing_else_is_served(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    found = gw.http.get("/ui/try")
    assert found.headers["content-security-policy"].startswith("default-src 'none'")
    assert gw.http.head("/ui/try").content == b""
    assert gw.http.get("/ui/understudy.js").text == (SDK / "understudy.js").read_text()
    for path in ("/ui/", "/ui/try.html", "/ui/../app.py", "/ui/%2e%2e/app.py"):
        assert gw.http.get(path).status_code == 404
    assert gateway(fake, listen={"try_page": False}).http.get("/ui/try").status_code == 404


@pytest.mark.parametrize(("width", "shown", "hidden"), [(1200, "wide", "narrow"), (400, "narrow", "wide")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_operator_sees_a_rollout_on_any_screen(
    rollout: str, chromium: Browser, width: int, shown: str, hidden: str, scheme: Any
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, problems = context.new_page(), []
    page.on("console", lambda said: problems.append(said.text))
    page.goto(f"{rollout}/ui/")
    expect(page).to_have_url(f"{rollout}/ui/rollout")
    expect(page.locator("h2")).to_contain_text("running")
    expect(page.locator(".steps [aria-current=step]")).to_be_visible()
    expect(page.locator(f".chart.{shown} .middle")).to_be_visible()
    expect(page.locator(f".chart.{hidden} svg")).not_to_be_visible()
    expect(page.locator(".rails tbody tr")).to_have_count(5)
    expect(page.locator(".log li").last).to_contain_text("begin by learner")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(251, 251, 250)") == (scheme == "light"), "the stylesheet is in use, in its scheme"
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing hangs over the edge"
    page.get_by_text("hold still").click()
    expect(page.locator("meta[http-equiv=refresh]")).to_have_count(0)
    context.close()
    assert [text for text in problems if "favicon" not in text and "404" not in text] == []


@pytest.fixture(scope="module")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page of a rollout with a past is served."""
    settings = config(tmp_path_factory.mktemp("rollout"))
    plant(settings)
    with served(settings) as url:
        yield url


def test_the_module_is_small() -> None:
    assert len(gzip.compress((SDK / "understudy.js").read_bytes(), 9)) <= 4096


def said(gw: Gateway) -> tuple[str, str]:
    answer = gw.chat()
    gw.interaction()
    return answer.json()["id"], answer.headers["x-understudy-feedback-token"]


def observed(page: Page, name: str | None, token: str, html: str) -> None:
    """An answer in the page, observed as `window.answer`."""
    page.evaluate(
        """async ([responseId, token, html]) => {
            const { connect } = await import("/ui/understudy.js");
            const element = Object.assign(document.createElement("div"), { id: "shown", innerHTML: html });
            document.querySelector("#talk").replaceChildren(element);
            window.answer = connect().observe(element, Promise.resolve({ responseId: responseId ?? undefined, token }));
        }""",
        [name, token, html],
    )
