"""The admin listener: operators see each rollout with its doubts, others nothing, and nothing can be changed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import eventually
from planted_rollout import ROUTE, STAGES, config, plant, served, version

from gateway import rollout_chart, rollout_page
from gateway.admin import Named
from learner.registry import Registry
from router.rollout_controller import ask, propose
from telemetry.journal import Journal
from telemetry.sqlite import connect
from understudy.compose import open_store, route_plans
from understudy.demo.vllm_server import free_port
from understudy.rollout_report import estimate, rollout_report
from understudy.serve import bind_admin
from understudy.settings import Admin, Settings


@contextlib.contextmanager
def asked(settings: Settings) -> Iterator[httpx.Client]:
    """A client of the real listener."""
    with served(settings) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a rollout that runs and has a past."""
    settings = config(tmp_path_factory.mktemp("planted"))
    plant(settings)
    return settings


@pytest.fixture(scope="module")
def admin(planted: Settings) -> Iterator[httpx.Client]:
    with asked(planted) as client:
        yield client


def reported(settings: Settings, now: float | None = None) -> dict[str, Any]:
    store, journal = open_store(settings), Journal(settings.journal_path)
    try:
        return rollout_report(route_plans(settings), store, journal, now or time.time())[0]
    finally:
        store.close()
        journal.close()


class Texts(HTMLParser):
    """Checks that elements are closed in their order, and keeps texts by the class or name of what they stand in."""

    VOID = ("meta", "link", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def words(page: str) -> str:
    return " ".join(" ".join(Texts(page).text).split())


# ---- what is said of a rollout -------------------------------------------------------------------------


def test_the_report_says_where_a_rollout_stands(planted: Settings) -> None:
    row = reported(planted)
    rollout, standing = row["rollout"], row["standing"]
    assert (rollout["phase"], rollout["challenger"], rollout["control"]) == (
        "running",
        row["aliases"]["challenger"],
        row["aliases"]["champion"],
    )
    states = [stage["state"] for stage in row["stages"]]
    assert states == ["done"] * rollout["step"] + ["current"] + ["ahead"] * (3 - rollout["step"])
    assert rollout["cap"] == STAGES[rollout["step"]]["share"]
    assert 0 < rollout["drawn"]["share"] <= rollout["cap"] + 1e-9
    assert standing["lower"] < standing["difference"] < standing["upper"]
    assert standing["history"][-1][1] == standing["challenger"]["judged"] + standing["control"]["judged"]
    assert standing["level"] == pytest.approx(0.96)
    assert not standing["late"]
    numbers = [one["at"] for one in row["decisions"]]
    assert numbers == sorted(numbers, reverse=True)
    assert row["decisions"][-1]["actor"] == "learner"


def test_the_holdout_does_not_count_as_the_challengers_share(planted: Settings) -> None:
    store = open_store(planted)
    snapshot = store.snapshot(ROUTE)
    store.close()
    assert snapshot is not None
    weight = snapshot.segments[""][snapshot.challenger]
    assert reported(planted)["rollout"]["drawn"]["share"] == pytest.approx(0.95 * weight)


def test_nothing_of_the_rollout_before_is_shown_of_the_next_one(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first = plant(settings, looks=12, at_once=100, errors=(0.15, 0.01))
    row = reported(settings)
    assert (first.phase, row["standing"]["guardrails"][0]["tripped"]) == ("rolled_back", True)
    assert row["rollout"]["drawn"] is None
    store = open_store(settings)
    registry = Registry(store)
    third = registry.register(version("3"), settings.journal_path.parent)
    propose(store, registry, ROUTE, third.name, "learner", "again", time.time())
    store.close()
    row = reported(settings)
    assert (row["rollout"]["number"], row["rollout"]["phase"], row["standing"]) == (2, "pending", None)
    assert {one["rollout"] for one in row["decisions"]} == {first.id, row["rollout"]["id"]}


def test_a_controller_that_stopped_looking_is_told_of(planted: Settings) -> None:
    later = time.time() + 600
    row = reported(planted, later)
    assert row["standing"]["late"]
    assert "Last looked at 10 min ago" in words(rollout_page.page([row], later))


@pytest.mark.parametrize(
    ("mean", "of", "low", "high"),
    [(0.0, 10, 0.0, 0.2775), (0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0), (0.1, 50, 0.0435, 0.2136)],
)
def test_intervals_are_wilsons(mean: float, of: int, low: float, high: float) -> None:
    found = estimate(mean, of)
    assert found is not None
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))
    assert estimate(None, 0) is None


# ---- the page ------------------------------------------------------------------------------------------


def test_the_page_shows_step_share_difference_guardrails_and_log(admin: httpx.Client, planted: Settings) -> None:
    page = admin.get("/ui/rollout").text
    row, text = reported(planted), words(page)
    standing, rollout = row["standing"], row["rollout"]
    bounds = [rollout_chart.signed(standing[name]) for name in ("difference", "lower", "upper")]
    assert f"{bounds[0]} [{bounds[1]}, {bounds[2]}]" in text
    assert standing["said"] in text
    assert f"Step {rollout['step'] + 1} of 4" in text
    assert f"{rollout['challenger']} against {rollout['control']}" in text
    for rail in standing["guardrails"]:
        assert rail["metric"].replace("_", " ") in text
        assert rail["limit"] in text
    for one in row["decisions"]:
        assert one["why"] in text
    assert 'aria-current="step"' in page
    assert page.count('<polyline class="middle"') == 2, "one drawing for wide screens and one for narrow ones"
    assert "script" not in Texts(page).seen


def test_every_estimate_on_the_page_has_its_interval(planted: Settings) -> None:
    row = reported(planted)
    page = rollout_page.page([row], time.time())
    cells = re.findall(r'<td data-of="(?:challenger|control)">(.*?)</td>', page)
    assert len(cells) >= 14
    for cell in cells:
        known = cell in ("–",) or "judged" in cell
        ratio = row["standing"]["guardrails"][-1]["control"]["value"]
        drawn = cell == f"{100 * ratio:.1f}%".replace(".0%", "%")  # what was to be drawn is known exactly
        assert known or drawn or re.search(r"<small>(\[.*, .*\]|of [\d,]+)</small>", cell), cell


def test_whatever_comes_in_is_text(planted: Settings) -> None:
    evil = "<script>alert(1)</script>\"'&<b>"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(below) for key, below in value.items()}
        if isinstance(value, list):
            return [poisoned(below) for below in value]
        return f"{value}{evil}" if isinstance(value, str) else value

    row = reported(planted)
    bad = poisoned(row)
    bad["rollout"]["phase"], bad["standing"]["verdict"] = "paused", row["standing"]["verdict"]
    bad["standing"]["unfit"] = bad["standing"]["doubt"] = evil
    page = rollout_page.page([bad, row], time.time())
    found = Texts(page)
    assert "script" not in found.seen
    assert "<script" not in page
    assert "".join(found.text).count("<script>alert(1)</script>") > 20
    assert "<script" not in rollout_page.trouble(evil)


@pytest.mark.parametrize(
    ("route", "how", "phase", "says"),
    [
        ({}, {"looks": 12, "at_once": 100, "errors": (0.15, 0.01)}, "rolled_back", ["rolled back", "tripped"]),
        ({"rollout": {"require_approval": ["begin"]}}, {"looks": 1}, "pending", ["approval to begin", "Not looked at"]),
        ({"rollout": {"stages": [{"pause": True}, {"share": 0.5}]}}, {"looks": 2}, "paused", ["an operator"]),
        (
            {"rollout": {"stages": [{"share": 0.5, "min_sessions": 0, "min_time": 0}]}},
            {"looks": 24, "at_once": 160, "good": (0.8, 0.5)},
            "promoted",
            ["users are better off", "Ended", "promote by controller"],
        ),
    ],
    ids=["rolled back", "pending", "paused", "promoted"],
)
def test_the_page_of_each_phase(tmp_path: Path, route: Any, how: Any, phase: str, says: list[str]) -> None:
    settings = config(tmp_path, **route)
    assert plant(settings, **how).phase == phase
    text = words(rollout_page.page([reported(settings)], time.time()))
    for one in says:
        assert one in text


def test_a_route_without_rollouts_says_so(tmp_path: Path) -> None:
    for wanted, says in ((None, "the config has no rollout for it"), ({}, "No rollout yet")):
        with asked(config(tmp_path, rollout=wanted)) as admin:
            assert says in words(admin.get("/ui/rollout").text)
            (row,) = admin.get("/admin/rollout").json()["routes"]
            assert (row["enabled"], row["rollout"], row["champion"]) == (wanted is not None, None, "champion")


def test_holding_still_turns_the_reloading_off(admin: httpx.Client) -> None:
    assert '<meta http-equiv="refresh" content="10">' in admin.get("/ui/rollout").text
    assert "refresh" not in admin.get("/ui/rollout?live=off").text


@pytest.mark.parametrize("history", [[], [[1.0, 10, 0.1, -0.2, 0.4]], [[1.0, 10, 0.1, 0.0, 0.2]] * 3])
def test_there_is_no_drawing_without_a_way_to_draw(history: Any) -> None:
    assert rollout_chart.difference(history, 0.02, "t", rollout_chart.WIDE, "n") == ""


def test_the_drawing_keeps_the_later_bounds_inside() -> None:
    history = [[float(n), 10 * n, 0.05, 0.05 - 4 / n, 0.05 + 4 / n] for n in range(1, 200)]
    drawn = rollout_chart.difference(history, 0.02, "t", rollout_chart.WIDE, "n")
    (middle,) = re.findall(r'class="middle" points="([^"]*)"', drawn)
    (zero,) = re.findall(r'class="zero"[^>]*y1="([\d.]+)"', drawn)
    (margin,) = re.findall(r'class="margin"[^>]*y1="([\d.]+)"', drawn)
    last = [float(value) for value in middle.split(" ")[-1].split(",")]
    assert last[0] == pytest.approx(rollout_chart.WIDE[0] - rollout_chart.RIGHT)
    assert rollout_chart.TOP < last[1] < float(zero) < float(margin) < rollout_chart.WIDE[1] - rollout_chart.BOTTOM


# ---- who may look, and that looking is all -------------------------------------------------------------


def test_addresses_lead_to_the_page_and_no_other_site_gets_in(admin: httpx.Client) -> None:
    for path in ("/", "/ui", "/ui/"):
        assert admin.get(path).headers["location"] == "/ui/rollout"
    assert admin.get("/healthz").text == "ok\n"
    assert admin.get("/ui/rollout.css").headers["content-type"].startswith("text/css")
    for path in ("/ui/rollout", "/admin/rollout", "/ui/rollout.css", "/nothing", "/ui/"):
        headers = admin.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'; frame-ancestors")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
    for path in ("/nothing", "/v1/models", "/ui/rollout/", "/ui/rollout.css/../../app.py", "/ui/try"):
        assert admin.get(path).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(admin: httpx.Client, method: str) -> None:
    for path in ("/ui/rollout", "/admin/rollout", "/healthz", "/"):
        assert admin.request(method, path).status_code == 405


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:4001", 200),
        ("127.0.0.1:4001", 200),
        ("[::1]:9", 200),
        ("evil.example", 421),
        ("evil.example:4001", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil@127.0.0.1", 421),
        ("10.0.0.1", 421),
        ("localhost:4001:80", 421),
        ("", 421),
    ],
)
def test_only_this_machines_names_are_answered(admin: httpx.Client, header: str, status: int) -> None:
    for path in ("/ui/rollout", "/admin/rollout", "/healthz"):
        said = admin.get(path, headers={"host": header})
        assert said.status_code == status
        assert (ROUTE in said.text) == (status == 200 and path != "/healthz")


@pytest.mark.parametrize(
    ("host", "allowed", "refused"),
    [
        ("10.1.2.3", ["10.1.2.3:4001", "localhost"], ["10.1.2.4", "evil.example"]),
        ("ops.internal", ["Ops.Internal:4001"], ["internal", "10.1.2.3"]),
        ("fd00::1", ["[fd00::1]:4001"], ["[fd00::2]", "fd00::1"]),
        ("0.0.0.0", ["10.9.9.9", "[fd00::2]:1", socket.gethostname()], ["evil.example"]),
        ("::", ["10.9.9.9"], ["evil.example", ""]),
    ],
)
def test_its_own_address_is_answered_too(host: str, allowed: list[str], refused: list[str]) -> None:
    named = Named(host)
    assert [name for name in allowed if not named.allow(name)] == []
    assert [name for name in refused if named.allow(name)] == []


def test_while_the_state_cannot_be_read_the_page_says_why(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with asked(settings) as admin:
        assert admin.get("/admin/rollout").status_code == 200
        db = connect(settings.journal_path, "test", [])
        db.execute("DROP TABLE documents")
        db.close()
        page, rows = admin.get("/ui/rollout"), admin.get("/admin/rollout")
    assert (page.status_code, rows.status_code) == (503, 503)
    assert "no such table" in words(page.text)
    assert "no such table" in rows.json()["error"]["message"]


def test_what_an_operator_asked_is_seen_at_the_next_look(tmp_path: Path) -> None:
    settings = config(tmp_path)
    plant(settings, looks=2)
    policy = settings.routes[ROUTE].rollout
    assert policy is not None
    with asked(settings) as admin:
        store = open_store(settings)
        ask(store, ROUTE, "pause", "somebody", "lunch", time.time(), policy)
        store.close()
        (row,) = admin.get("/admin/rollout").json()["routes"]
        assert row["rollout"]["phase"] == "paused"
        first = row["decisions"][0]
        assert (first["verb"], first["actor"], first["why"]) == ("pause", "somebody", "lunch")
        assert "pause by somebody" in words(admin.get("/ui/rollout").text)


# ---- the process ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def supervised(folder: Path, admin: object) -> Iterator[tuple[subprocess.Popen[bytes], Path, str]]:
    port = free_port()
    path, log = folder / "understudy.yaml", folder / "log"
    config(folder)
    written = yaml.safe_load(path.read_text()) | {"listen": {"port": port}, "admin": admin}
    path.write_text(yaml.safe_dump(written))
    with log.open("wb") as out:
        command = [sys.executable, "-m", "understudy", "serve", "--config", str(path)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            eventually(lambda: answers(f"http://127.0.0.1:{port}/healthz"), 60, 0.1)
            yield process, log, f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def holder(supervisor: int, port: int) -> int:
    """Which child of the supervisor has the socket that listens on a port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = (row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A")
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    (pid,) = (one for one in children if f"socket:[{inode}]" in map(os.readlink, Path(f"/proc/{one}/fd").iterdir()))
    return int(pid)


def test_serve_shows_rollouts_and_starts_again_what_died(tmp_path: Path) -> None:
    port = free_port()
    with supervised(tmp_path, {"port": port}) as (process, log, _):
        url = f"http://127.0.0.1:{port}/ui/rollout"
        eventually(lambda: answers(url), 30, 0.1)
        found = re.search(r"rollouts are shown at (\S+)", log.read_text())
        assert found is not None
        assert found[1] == url
        pid = holder(process.pid, port)
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert not any(heavy in loaded for heavy in ("libtorch", "/sklearn/", "/scipy/"))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: "admin ended with -9; starting it again" in log.read_text(), 20, 0.1)
        eventually(lambda: answers(url), 30, 0.1)


def test_a_taken_port_is_a_warning_and_apps_are_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert bind_admin(settings.model_copy(update={"admin": Admin(port=port)})) is None
    (said,) = caplog.messages
    assert said.startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use; change `admin.port`")


def test_null_is_no_listener_and_a_public_one_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(tmp_path)
    assert bind_admin(settings.model_copy(update={"admin": None})) is None
    private = bind_admin(settings.model_copy(update={"admin": Admin(port=0)}))
    assert private is not None
    private.close()
    assert caplog.messages == []
    public = bind_admin(settings.model_copy(update={"admin": Admin(host="0.0.0.0", port=0)}))
    assert public is not None
    public.close()
    assert "without a key" in caplog.text
