"""Commands that run something: `serve`, `doctor`, `replay`, `demo`."""

from __future__ import annotations

import sys
from pathlib import Path

from understudy.cli.common import Arguments, Commands, command, config_option, emit, json_option


def add_serve(commands: Commands) -> None:
    serve = command(commands, "serve", _serve, "Serve the gateway and its controller.")
    config_option(serve)


def _serve(arguments: Arguments) -> int:
    from understudy.serve import serve

    return serve(arguments.config)


def add_doctor(commands: Commands) -> None:
    doctor = command(commands, "doctor", _doctor, "Check the config, the state, the port and every upstream.")
    config_option(doctor)
    json_option(doctor)


def _doctor(arguments: Arguments) -> int:
    from understudy import show
    from understudy.doctor import examine

    findings = examine(arguments.config)
    emit(arguments, [finding._asdict() for finding in findings], lambda: show.findings(findings))
    return 0 if all(finding.ok for finding in findings) else 1


def add_replay(commands: Commands) -> None:
    help = "Send recorded conversations through a running gateway with the real openai client."
    replay = command(commands, "replay", _replay, help)
    replay.add_argument("file", type=Path, help="JSON lines: user, task, t, messages, copies")
    replay.add_argument("--base-url", default="http://127.0.0.1:4000/v1", help="the gateway's (default: %(default)s)")
    replay.add_argument("--route", required=True, help="the model name to ask for")
    replay.add_argument("--as-fast", action="store_true", help="without the recorded pauses")
    replay.add_argument("--api-key", default="replay", help="if the gateway requires one")
    replay.add_argument("--max-tokens", type=int, help="cut each answer (default: the upstream's own limit)")
    replay.add_argument("--limit", type=int, help="only the first N requests")
    json_option(replay)


def _replay(arguments: Arguments) -> int:
    from understudy import replay, show

    try:
        rows = replay.read(arguments.file)[: arguments.limit]
    except (OSError, replay.BadRecording) as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 1
    with show.progress("replaying", len(rows), quiet=arguments.json) as advance:
        tally = replay.play(
            rows,
            arguments.base_url,
            arguments.route,
            as_fast=arguments.as_fast,
            api_key=arguments.api_key,
            max_tokens=arguments.max_tokens,
            progress=lambda so_far: advance(so_far.requests),
        )
    summary = tally.summary()
    emit(arguments, summary, lambda: show.summary(summary))
    return 1 if tally.failures else 0


def add_demo(commands: Commands) -> None:
    help = "The whole story on a real vLLM: users, a challenger that takes over, and a worse one that is rolled back."
    demo = command(commands, "demo", _demo, help)
    demo.add_argument("--fast", action="store_true", help="fewer users and a shorter training: under three minutes")
    demo.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="where the tiny models are kept")
    demo.add_argument("--state", help="where state is kept, as in the config (default: an SQLite file of its own)")
    demo.add_argument("--keep", type=Path, help="a folder to keep everything in (default: only the picture, here)")
    json_option(demo)


def _demo(arguments: Arguments) -> int:
    from understudy.demo.story import tell

    return tell(arguments.cache, arguments.keep, fast=arguments.fast, as_json=arguments.json, state=arguments.state)
