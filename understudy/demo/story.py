"""`understudy demo`, top to bottom, on real parts; only the users are simulated (`people.py`).

A tiny base model on a real vLLM pleases half of the time → what users do with its answers becomes a dataset → DPO makes
a challenger → the gate → shadow and canary → it takes over. Then the app is changed, and a challenger that looked
better in its gate turns out worse for users: it rolls itself back. Ends with a table, and a picture.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from learner.registry import Registry
from router.rollout import Rollout
from router.rollout_controller import load as load_rollout
from telemetry.errors import UnderstudyError
from telemetry.journal import Journal
from understudy import learning, show
from understudy.compose import open_store
from understudy.demo import picture, planted, tiny_model
from understudy.demo.people import Crowd, Visit
from understudy.demo.picture import Mark
from understudy.demo.vllm_server import VllmServer, free_port
from understudy.settings import load

ROUTE = "assistant"
CONFIG = """\
listen: {{host: 127.0.0.1, port: {port}, workers: 2}}
admin: {{port: {admin}}}
state: {state}
journal: {folder}/understudy.db
routes:
  assistant:
    upstreams: [{vllm}]
    arms:
      champion: {{model: base}}           # versions come and go by themselves
    policy: {{kind: thompson, refresh: 500ms}}
    reward: {{window: 1s}}                # users who copy or ask again do so at once
    learner:
      base: {base}
      folder: {folder}/learner
      min_pairs: 20
      min_interval: 0s
      max_loras: 5
      dataset: {{held_out: 0.5}}
      train: {{max_epochs: {epochs}, evaluate_every: 10, max_length: 96}}
      gate:                               # few people are heard here, so little can be shown: wider margins
        margins: {{preference: 0.2, refusals: 0.1, form: 0.1}}
        max_length_ratio: 1.5x            # “A carrot is a vegetable.” is longer than “It depends.”
        max_slowdown: 3x
        temperature: 1.0
        duels: {duels}
        pairs: {duels}
    rollout:                              # as everywhere, but in a hurry
      interval: 250ms
      stages:
        - {{shadow: 0.5, min_sessions: {few}, min_time: 2s}}
        - {{share: 0.05, min_sessions: 3, min_time: 2s}}
        - {{share: 0.2, min_sessions: {few}, min_time: 2s}}
        - {{share: 0.5, min_sessions: {some}, min_time: 2s}}
        - {{share: 1.0, min_sessions: {some}, min_time: 2s}}
      guardrails:                         # all share two cores here: times say nothing
        - {{metric: error_rate, worse_by: 1.5x, action: rollback}}
        - {{metric: flag_rate, worse_by: 2x, action: rollback}}
        - {{metric: signal_rate, worse_by: 1.5x, action: pause}}
        - {{metric: sample_ratio, action: pause}}
"""

PATIENCE = 240.0
"""Seconds for which people come and go until a rollout has ended."""


class Pace(NamedTuple):
    """How much of everything."""

    before: int
    """Sessions that the first dataset is made of."""
    after: int
    """Sessions after each decision."""
    duels: int
    epochs: int
    few: int
    some: int


CALM = Pace(before=900, after=200, duels=400, epochs=2, few=20, some=60)
FAST = Pace(before=560, after=100, duels=240, epochs=2, few=10, some=25)


@dataclass
class Told:
    """What came of it."""

    champion: str
    promoted: str
    rolled_back: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    gain: float
    interval: tuple[float, float]
    decisions: list[dict[str, Any]]
    sessions: int
    did: dict[str, int]
    failures: list[str]
    seconds: float
    picture: str
    gate_of_the_bad_one: str
    simulated: bool = True
    lineage: list[str] = field(default_factory=list)


class StoryFailed(UnderstudyError):
    """The story did not go as it should; says where."""


def tell(
    cache: Path,
    keep: Path | None,
    *,
    fast: bool = False,
    as_json: bool = False,
    state: str | None = None,
    vllm: VllmServer | None = None,
) -> int:
    """Run the demo; 0 if the good challenger took over, the bad one did not, and no request failed.

    `state`: where it is kept, a file of the demo's own by default. `vllm`: one that serves the tiny base already.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        if not as_json:
            show.console.print(f"[dim]{time.monotonic() - began:5.0f} s[/] {text}", soft_wrap=True)

    say("making a tiny Llama from scratch (once; then cached)")
    models = tiny_model.build(cache, lambda text: say(f"[dim]{text}[/]"))
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(keep))
        server = vllm or stack.enter_context(VllmServer(models, log=folder / "vllm.log", say=say, lora=()))
        place = state or f"sqlite:///{folder}/understudy.db"
        stage = Stage(folder, place, server.url, models, FAST if fast else CALM, say)
        with stage:
            told = stage.play()
        told.seconds = time.monotonic() - began
        _keep_picture(folder, keep, told)
    if as_json:
        print(json.dumps(asdict(told), indent=2))
    else:
        _conclude(told)
    return 1 if told.failures else 0


class Stage:
    """The gateway before vLLM, and what happens on it."""

    def __init__(
        self,
        folder: Path,
        state: str,
        vllm: str,
        models: tiny_model.TinyModels,
        pace: Pace,
        say: Callable[[str], None],
    ) -> None:
        self._say, self._pace, self._models = say, pace, models
        self._folder = folder
        self._config = folder / "understudy.yaml"
        port, admin = free_port(), free_port()
        self._url, self._page = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}/ui/rollout"
        self._config.write_text(
            CONFIG.format(
                port=port, admin=admin, folder=folder, state=state, vllm=vllm, base=models.base, **pace._asdict()
            )
        )
        self._stack = ExitStack()
        self._crowd = Crowd(self._url, 7)
        self._marks: list[Mark] = []

    def __enter__(self) -> Stage:
        self._stack.enter_context(gateway(self._config, self._url, self._folder / "gateway.log"))
        settings = load(self._config)
        self._store = self._stack.enter_context(closing(open_store(settings)))
        self._journal = self._stack.enter_context(closing(Journal(settings.journal_path)))
        self._shop = learning.workshop(settings, ROUTE, self._journal, self._store)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def play(self) -> Told:
        """The story."""
        say, crowd = self._say, self._crowd
        say(f"the gateway serves {self._url}/v1, and the page of rollouts is {self._page}")
        say(
            "cooks copy or ask again, builders give thumbs, readers correct; the champion pleases them half of the time"
        )
        with crowd.at_work(self._pace.before):
            pass
        self._say_pleased("so far", crowd.visits)

        say("[bold]understudy learn once[/]: signals → dataset → DPO → registry → vLLM → gate")
        self._learn()
        first = self._rolled_out("promoted")
        self._settle()
        after = [one for one in crowd.visits if one.at >= first.ended and one.model == first.challenger]
        before = [one for one in crowd.visits if one.at < first.began]
        self._say_pleased("with the new champion", after)

        say("the app is changed: it asks for brief answers from now on. A challenger comes from elsewhere")
        crowd.brief = True
        version, report = planted.bring_in(self._shop, self._models.two_faced, say)
        if report.verdict != "pass":
            raise StoryFailed(f"the planted challenger should pass its gate, and did not: {report.why}")
        planted.roll_out(self._shop, version, report)
        second = self._rolled_out("rolled_back")
        self._settle()
        return self._told(first, second, before, after, report.why)

    def _learn(self) -> None:
        command = [sys.executable, "-m", "understudy", "learn", "once", "--config", str(self._config)]
        done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert done.stdout is not None
        for line in done.stdout:
            self._say(f"  [dim]{escape(line.rstrip())}[/]")
        errors = done.communicate()[1]
        if done.returncode:
            raise StoryFailed(f"the learner ended with {done.returncode}: {errors.strip()}")

    def _rolled_out(self, wanted: str) -> Rollout:
        """People come and go until the rollout has ended; it must end so."""
        told, deadline = 0, time.monotonic() + PATIENCE
        with self._crowd.at_work():
            while True:
                rollout = load_rollout(self._store, ROUTE)[1]
                assert rollout is not None
                for one in rollout.decisions[told:]:
                    self._say(f"  {one.verb}: {escape(one.why)}")
                told = len(rollout.decisions)
                if not rollout.active:
                    break
                if time.monotonic() > deadline:
                    raise StoryFailed(f"the rollout of {rollout.challenger} is {rollout.phase} still: {rollout.why}")
                time.sleep(0.2)
        good = rollout.phase == "promoted"
        self._marks += [
            Mark(rollout.began, f"{rollout.challenger.rpartition('-')[0]} in shadow"),
            Mark(rollout.ended, "promoted" if good else "rolled back", good),
        ]
        if rollout.phase != wanted:
            raise StoryFailed(f"{rollout.challenger} should be {wanted}, and is {rollout.phase}: {rollout.why}")
        return rollout

    def _settle(self) -> None:
        with self._crowd.at_work(self._pace.after):
            pass

    def _say_pleased(self, when: str, visits: Sequence[Visit]) -> None:
        pleased = sum(one.pleased for one in visits) / max(1, len(visits))
        self._say(f"{when}: {pleased:.0%} of {len(visits)} sessions pleased; {_counted(self._crowd.did)}")

    def _told(
        self, first: Rollout, second: Rollout, before: Sequence[Visit], after: Sequence[Visit], passed: str
    ) -> Told:
        gain, low, high = picture.gained([one.pleased for one in before], [one.pleased for one in after])
        registry = Registry(self._store)
        lineage = _lineage(registry, first, before)
        names = {"base": "base", first.challenger: first.challenger, second.challenger: second.challenger}
        drawn = self._folder / "demo.svg"
        drawn.write_text(picture.draw(self._crowd.visits, names, self._marks, lineage))
        decisions = [*first.decisions, *second.decisions]
        champion = registry.alias(ROUTE, "champion")
        return Told(
            champion=champion or "base",
            promoted=first.challenger,
            rolled_back=second.challenger,
            before={"sessions": len(before), "pleased": _share(before)},
            after={"sessions": len(after), "pleased": _share(after)},
            gain=gain,
            interval=(low, high),
            decisions=[
                {"at": one.at, "verb": one.verb, "actor": one.actor, "why": one.why, "challenger": one.challenger}
                for one in decisions
            ],
            sessions=len(self._crowd.visits),
            did=dict(self._crowd.did),
            failures=self._crowd.failures,
            seconds=0.0,
            picture=str(drawn),
            gate_of_the_bad_one=passed,
            lineage=lineage,
        )


def _lineage(registry: Registry, first: Rollout, before: Sequence[Visit]) -> list[str]:
    version = registry.version(first.challenger)
    metrics = registry.metrics(version.name)
    accuracy = metrics.get("held_out_accuracy")
    learned = "" if accuracy is None else f", agrees with held-out people in {accuracy:.0%} of pairs"
    promoted = next((one for one in first.decisions if one.verb == "promote"), None)
    return [
        f"{len(before)} sessions of base → dataset {version.dataset[:12]} → DPO on base {version.base_hash[:12]}",
        f"→ {version.name}{learned}",
        f"→ gate: {first.decisions[0].why}",
        f"→ rollout {first.id}: {promoted.why if promoted else first.why}",
    ]


def _share(visits: Sequence[Visit]) -> float:
    return sum(one.pleased for one in visits) / max(1, len(visits))


def _counted(did: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {count}" for what, count in did.items())


def _keep_picture(folder: Path, keep: Path | None, told: Told) -> None:
    """Out of a folder that is not kept."""
    if keep is None:
        told.picture = str(shutil.copy(folder / "demo.svg", Path("understudy-demo.svg").resolve()))


def _conclude(told: Told) -> None:
    table = Table("", "sessions", "pleased", box=None, padding=(0, 2, 0, 0))
    table.add_row("base, before", str(told.before["sessions"]), f"{told.before['pleased']:.1%}")
    table.add_row(f"{told.promoted}, after", str(told.after["sessions"]), f"{told.after['pleased']:.1%}")
    console = show.console
    console.print(table)
    low, high = told.interval
    points = escape(f"{100 * told.gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
    console.print(f"[bold]{told.promoted}[/] was promoted: {points} of pleased sessions, 95 %")
    why = told.decisions[-1]["why"]
    console.print(f"[bold]{told.rolled_back}[/] passed its gate and was rolled back: {escape(why)}")
    for line in told.lineage:
        console.print(f"  {escape(line)}", soft_wrap=True)
    console.print(f"the picture: {told.picture}; {told.seconds:.0f} s, {told.sessions} sessions of simulated users")
    for failure in told.failures[:5]:
        console.print(f"[red]failed:[/] {escape(failure)}")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="understudy-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def gateway(config: Path, url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`understudy serve` as a child process, ready; stopped at the end. Raises RuntimeError with its log."""
    with log.open("wb") as out:
        command = [sys.executable, "-m", "understudy", "serve", "--config", str(config)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while not _answers(f"{url}/readyz"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the gateway did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
