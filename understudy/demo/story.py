"""`understudy demo`, top to bottom: tiny models → real vLLM → gateway → simulated users → who won, and why."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from rich.live import Live

from router.controller import matured
from router.plan import RoutePlan
from telemetry.journal import Journal
from understudy import report, show
from understudy.compose import open_store, route_plans
from understudy.demo import tiny_model
from understudy.demo.vllm_server import VllmServer, free_port
from understudy.settings import load

CONFIG = """\
listen: {{host: 127.0.0.1, port: {port}, workers: 2}}
state: sqlite:///{folder}/understudy.db
routes:
  assistant:
    upstreams: [{vllm}]
    arms:
      champion: {{model: hasty}}
      challenger: {{model: careful}}
    policy: {{kind: thompson, refresh: 500ms}}
    reward: {{window: 1s}}    # users who copy or ask again do so at once
"""

PEOPLE_AT_ONCE = 4
WINDOWS = 6


@dataclass
class Progress:
    """What the simulated people have seen so far."""

    sessions: int = 0
    served: list[str] = field(default_factory=list)
    """The model that served each session, in order."""
    did: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def tell(sessions: int, cache: Path, keep: Path | None, *, as_json: bool) -> int:
    """Run the demo; 0 if no request failed."""
    say: Callable[[str], None] = (lambda text: None) if as_json else (lambda text: show.console.print(f"· {text}"))
    say("making a tiny Llama and two LoRA versions of it (once; then cached)")
    models = tiny_model.build(cache, say)
    with _folder(keep) as folder, VllmServer(models, log=folder / "vllm.log", say=say) as vllm:
        config = folder / "understudy.yaml"
        port = free_port()
        config.write_text(CONFIG.format(port=port, folder=folder, vllm=vllm.url))
        with gateway(config, f"http://127.0.0.1:{port}", folder / "gateway.log"):
            say(f"the gateway serves http://127.0.0.1:{port}/v1; the app asks it for the model `assistant`")
            say("the users are simulated: they copy an answer that is right and ask again after one that is not")
            progress = _live(config, port, sessions, quiet=as_json)
            rows = _settled(config, progress)
    _conclude(rows, progress, as_json)
    return 1 if progress.failures else 0


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


def _live(config: Path, port: int, sessions: int, *, quiet: bool) -> Progress:
    """Run the simulated people, showing what the router makes of it."""
    progress, chance = Progress(), random.Random(7)
    plans, store, journal = _opened(config)
    people = [(f"user-{n}", chance.choice(tiny_model.questions())) for n in range(sessions)]
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="demo", timeout=60) as client,
        Live(console=show.console, refresh_per_second=4, transient=True) as live,
        ThreadPoolExecutor(PEOPLE_AT_ONCE) as pool,
    ):
        waiting = [pool.submit(_person, client, user, question, progress) for user, question in people]
        while not all(done.done() for done in waiting):
            if not quiet:
                title = f"{progress.sessions} of {sessions} sessions (simulated users)"
                live.update(show.arms_table(report.arms(plans, store, journal, time.time()), title))
            time.sleep(0.25)
        for done in waiting:
            done.result()
    return progress


def _person(client: openai.OpenAI, user: str, question: tiny_model.Question, progress: Progress) -> None:
    """One session: ask; copy the answer if it is right, else ask again, at most twice."""
    who: dict[str, Any] = {"extra_headers": {"x-understudy-user": user, "x-understudy-session": f"{user}-chat"}}
    try:
        for attempt in range(3):
            answer = client.chat.completions.create(
                model="assistant",
                messages=[{"role": "user", "content": question.text}],
                temperature=0.7,
                **who,
            )
            if attempt == 0:
                progress.served.append(answer.model)
            if tiny_model.is_good(question, answer.choices[0].message.content or ""):
                feedback = {"response_id": answer.id, "kind": "copy", "user": user}
                client.post("/feedback", body=feedback, cast_to=dict[str, Any])
                progress.did["copied"] += 1
                break
            progress.did["asked again" if attempt < 2 else "gave up"] += 1
    except openai.OpenAIError as error:
        progress.failures.append(str(error))
    progress.sessions += 1


def _opened(config: Path) -> tuple[list[RoutePlan], Any, Journal]:
    settings = load(config)
    return route_plans(settings), open_store(settings), Journal(settings.journal_path)


def _settled(config: Path, progress: Progress) -> list[dict[str, Any]]:
    """The arms once the controller has counted all that happened, the last behaviour too, whose window must end."""
    plans, store, journal = _opened(config)
    marks = ["journal", *(matured(plan.reward.window) for plan in plans)]
    deadline = time.monotonic() + 20
    while min(map(store.marked, marks)) < journal.last() and time.monotonic() < deadline:
        time.sleep(0.1)
    rows = report.arms(plans, store, journal, time.time())
    for row in rows:
        row["share_over_time"] = _windows(progress.served, row["model"])
    store.close()
    journal.close()
    return rows


def _windows(served: list[str], model: str) -> list[float]:
    """The model's share of sessions in each of WINDOWS equal stretches of the demo."""
    size = max(1, len(served) // WINDOWS)
    stretches = [served[start : start + size] for start in range(0, size * WINDOWS, size)]
    return [stretch.count(model) / len(stretch) for stretch in stretches if stretch]


def _conclude(rows: list[dict[str, Any]], progress: Progress, as_json: bool) -> None:
    found = {
        "simulated": True,
        "sessions": progress.sessions,
        "did": dict(progress.did),
        "failures": progress.failures,
        "arms": rows,
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = show.console
    console.print(show.arms_table(rows, f"{progress.sessions} sessions of simulated users"))
    for row in rows:
        shares = " → ".join(f"{share:.0%}" for share in row["share_over_time"])
        console.print(f"[bold]{row['arm']}[/] served of the sessions, over time: {shares}")
    did = ", ".join(f"{what} {count} times" for what, count in progress.did.items())
    console.print(f"The users are simulated: they {did}. Every answer came from a real vLLM.")
    for failure in progress.failures[:5]:
        console.print(f"[red]failed:[/] {failure}")
