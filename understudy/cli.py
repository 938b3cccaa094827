"""The command line: arguments in, functions called, results printed. Exit 0 good, 1 failed check, 2 wrong usage."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from telemetry.errors import StateError
from understudy import settings as config

if TYPE_CHECKING:
    from router.controller import RoutePlan
    from router.store import Store
    from telemetry.journal import Journal

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        run: Callable[[Arguments], int] = arguments.run
        return run(arguments)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except StateError as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Wrong usage also says where the help is."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="understudy",
        description="An OpenAI-compatible gateway that hears what users do and lets the better model version win.",
    )
    top.add_argument("--version", action="version", version=f"understudy {_version()}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[Arguments], int], help: str, *, reads: bool = True
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        _config_option(added)
        if reads:
            _json_option(added)
        return added

    command("serve", _serve, "Serve the gateway and its controller.", reads=False)
    command("status", _status, "Who controls, how far it has read, how fresh the weights are.")
    command("arms", _arms, "Each arm's weight, share and posterior, and what moved it.")
    command("doctor", _doctor, "Check the config, the state, the port and every upstream.")
    rebuild = command("rebuild", _rebuild, "Count the journal anew and compare with the store; exit 1 if they differ.")
    rebuild.add_argument("--write", action="store_true", help="put it in the store's place; `serve` must be stopped")
    _add_signals(command)
    _add_config(commands)
    _add_keys(commands)
    _add_feedback(commands)
    _add_ope(commands)
    _add_replay(commands)
    _add_demo(commands)
    return top


def _add_signals(command: Callable[..., argparse.ArgumentParser]) -> None:
    signals = command("signals", _signals, "The newest signals and the answers that they are about.")
    signals.add_argument("--since", type=_span, default="1d", metavar="SPAN", help="not older than this (default: 1d)")
    signals.add_argument("--kind", help="of this kind only")
    signals.add_argument("--limit", type=int, default=50, help="at most so many (default: %(default)s)")
    signals.add_argument("--text", action="store_true", help="with what people wrote; this is put on record")
    forget = command("forget", _forget, "Erase a user's texts and names from the journal. The sums learned stay.")
    forget.add_argument("--user", required=True, help="by the name that the app gives them")
    forget.add_argument("--tenant", default="default", help="whose user it is (default: default)")

    mask = command("mask", _mask, "Let another recogniser (Presidio's, say) go over the texts that are kept.")
    mask.add_argument("--using", required=True, metavar="MODULE:FUNCTION", help="a function from text to masked text")
    mask.add_argument("--since", type=_span, default="30d", metavar="SPAN", help="facts not older than this (30d)")


def _add_feedback(commands: Any) -> None:
    about = commands.add_parser("feedback", help="Send feedback to a running gateway.")
    verbs = about.add_subparsers(metavar="send", required=True)
    send = verbs.add_parser("send", help="Send one item; exit 1 if it is refused.")
    send.set_defaults(run=_feedback_send)
    send.add_argument("--base-url", default="http://127.0.0.1:4000/v1", help="the gateway's (default: %(default)s)")
    send.add_argument("--api-key", help="if the gateway requires one")
    send.add_argument("--tenant", help="for a gateway without keys, or with an admin's")
    names = send.add_mutually_exclusive_group(required=True)
    names.add_argument("--response-id", help="the answer's `id`, or the request's")
    names.add_argument("--trace-id", help="its trace")
    names.add_argument("--session-id", help="a whole session, by the app's name for it")
    send.add_argument("--kind", required=True, help="thumb, rating, correction, comment, outcome, …")
    send.add_argument("--value", type=_json_value, help="JSON, or a word: true, 4, copied")
    for name, help in (
        ("name", "an outcome's"),
        ("text", "a comment's or a correction's"),
        ("user", "who says it"),
        ("event-id", "sent again, it counts once"),
    ):
        send.add_argument(f"--{name}", help=help)
    _json_option(send)


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _add_config(commands: Any) -> None:
    about = commands.add_parser("config", help="Check the config file, print its schema, or explain every key.")
    verbs = about.add_subparsers(metavar="check|schema|explain", required=True)
    for name, run, help in (
        ("check", _config_check, "Say what is wrong, by line and key; exit 1 if anything is."),
        ("schema", _config_schema, "Print the JSON Schema, for editors."),
        ("explain", _config_explain, "Print every key, and what each policy will do with a new arm, day by day."),
    ):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.set_defaults(run=run)
        _config_option(verb)
        _json_option(verb)
    help = "judged sessions a day to expect on each route (default: 500)"
    verb.add_argument("--sessions", type=float, default=500.0, help=help)


def _add_keys(commands: Any) -> None:
    about = commands.add_parser("keys", help="Make, list and revoke API keys of apps; rotate what signs their tokens.")
    verbs = about.add_subparsers(metavar="create|list|revoke|rotate", required=True)
    create = verbs.add_parser("create", help="Make a key; it is shown once.")
    create.add_argument("--tenant", default="default", help="whose traffic it carries (default: default)")
    create.add_argument("--role", choices=("app", "admin"), default="app", help="admins see and name arms")
    create.add_argument("--text", action="store_true", help="may read what people wrote; each time is put on record")
    listing = verbs.add_parser("list", help="List keys, never their secrets.")
    revoke = verbs.add_parser("revoke", help="Make a key invalid, within the routes' refresh time.")
    revoke.add_argument("id", help="as `keys list` shows it")
    help = "Make a new key that signs feedback tokens. Tokens of the last one stay valid, those before become invalid."
    rotate = verbs.add_parser("rotate", help=help, description=help)
    pairs = ((create, _keys_create), (listing, _keys_list), (revoke, _keys_revoke), (rotate, _keys_rotate))
    for verb, run in pairs:
        verb.set_defaults(run=run)
        _config_option(verb)
        _json_option(verb)


def _add_ope(commands: Any) -> None:
    help = "What another policy would have earned in the sessions that were served; exit 1 if it cannot be said."
    ope = commands.add_parser(
        "ope",
        help=help,
        description=f"{help} A split has its written shares. A policy that learns is replayed: in each session, the "
        "weights that it would have published at its start from the rewards known by then (those that the served "
        "sessions brought, not those that its own would have), floor and holdout included.",
        epilog='FILE holds for example "policy: {kind: split, shares: {champion: 0.5, challenger: 0.5}}".',
    )
    ope.set_defaults(run=_ope)
    ope.add_argument(
        "--policy", type=Path, required=True, metavar="FILE", help="a YAML file with `policy:`, as under a route"
    )
    ope.add_argument(
        "--since", type=_span, default="7d", metavar="SPAN", help="sessions that began in this time (default: 7d)"
    )
    ope.add_argument("--route", help="needed where the config has several")
    _config_option(ope)
    _json_option(ope)


def _span(text: str) -> float:
    from router.policy import seconds

    try:
        return seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_replay(commands: Any) -> None:
    help = "Send recorded conversations through a running gateway with the real openai client."
    replay = commands.add_parser("replay", help=help, description=help)
    replay.set_defaults(run=_replay)
    replay.add_argument("file", type=Path, help="JSON lines: user, task, t, messages, copies")
    replay.add_argument("--base-url", default="http://127.0.0.1:4000/v1", help="the gateway's (default: %(default)s)")
    replay.add_argument("--route", required=True, help="the model name to ask for")
    replay.add_argument("--as-fast", action="store_true", help="without the recorded pauses")
    replay.add_argument("--api-key", default="replay", help="if the gateway requires one")
    replay.add_argument("--max-tokens", type=int, help="cut each answer (default: the upstream's own limit)")
    replay.add_argument("--limit", type=int, help="only the first N requests")
    _json_option(replay)


def _add_demo(commands: Any) -> None:
    help = "Two versions of a tiny model on a real vLLM, simulated users, and the better one wins."
    demo = commands.add_parser("demo", help=help, description=help)
    demo.set_defaults(run=_demo)
    demo.add_argument("--sessions", type=int, default=300, help="how many simulated sessions (default: %(default)s)")
    demo.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="where the tiny models are kept")
    demo.add_argument("--keep", type=Path, help="a folder to keep the journal and config in (default: none is kept)")
    _json_option(demo)


def _config_option(to: argparse.ArgumentParser) -> None:
    to.add_argument("--config", type=Path, default=Path("understudy.yaml"), help="config file (default: %(default)s)")


def _json_option(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="print JSON")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("understudy")
    except PackageNotFoundError:
        return "of a source tree"


def _print(arguments: Arguments, data: Any, people: Callable[[], None]) -> None:
    if arguments.json:
        print(json.dumps(data, indent=2))
    else:
        people()


# The commands.


def _serve(arguments: Arguments) -> int:
    from understudy.serve import serve

    return serve(arguments.config)


def _status(arguments: Arguments) -> int:
    from understudy import report, show

    plans, store, journal = _opened(arguments)
    found = report.status(plans, store, journal, time.time())
    _print(arguments, found, lambda: show.status(found))
    return 0


def _arms(arguments: Arguments) -> int:
    from understudy import report, show

    plans, store, journal = _opened(arguments)
    found = report.arms(plans, store, journal, time.time())
    _print(arguments, found, lambda: show.arms(found))
    return 0


def _rebuild(arguments: Arguments) -> int:
    from understudy import rebuild, show

    plans, store, journal = _opened(arguments)
    if arguments.write:
        rebuild.replace(plans, store, journal)
    rows = rebuild.compare(plans, store, journal)
    waiting = max(0, journal.last() - store.marked("journal"))
    data = {"routes": rows, "facts_waiting": waiting, "written": arguments.write}
    _print(arguments, data, lambda: show.rebuilt(rows, waiting))
    return 0 if all(row["same"] for row in rows) else 1


def _ope(arguments: Arguments) -> int:
    from telemetry.journal import Journal
    from understudy import ope, show
    from understudy.compose import route_plans

    settings = config.load(arguments.config)
    name = arguments.route or next(iter(settings.routes))
    if name not in settings.routes or (arguments.route is None and len(settings.routes) > 1):
        print(f"understudy ope: --route must be one of {', '.join(settings.routes)}", file=sys.stderr)
        return 2
    policy = ope.load_policy(arguments.policy, settings.routes[name])
    plan = next(plan for plan in route_plans(settings) if plan.name == name)
    try:
        now = time.time()
        found = ope.examine(plan, policy, Journal(settings.journal_path), now - arguments.since, now)
    except ValueError as error:
        print(f"understudy: the journal cannot be evaluated: {error}", file=sys.stderr)
        return 1
    _print(arguments, found, lambda: show.ope(found))
    return 1 if found["refused"] else 0


def _opened(arguments: Arguments) -> tuple[list[RoutePlan], Store, Journal]:
    from telemetry.journal import Journal
    from understudy.compose import open_store, route_plans

    settings = config.load(arguments.config)
    return route_plans(settings), open_store(settings), Journal(settings.journal_path)


def _doctor(arguments: Arguments) -> int:
    from understudy import show
    from understudy.doctor import examine

    findings = examine(arguments.config)
    _print(arguments, [finding._asdict() for finding in findings], lambda: show.findings(findings))
    return 0 if all(finding.ok for finding in findings) else 1


def _config_check(arguments: Arguments) -> int:
    problems = config.check(arguments.config)
    notes = [] if problems else config.accepted_but_unused(config.load(arguments.config))
    data = {"problems": [dataclasses.asdict(problem) for problem in problems], "notes": notes}

    def people() -> None:
        for problem in problems:
            print(problem.render(arguments.config))
        for note in notes:
            print(f"note: {note}")
        if not problems:
            print(f"{arguments.config}: good")

    _print(arguments, data, people)
    return 1 if problems else 0


def _config_schema(arguments: Arguments) -> int:
    print(json.dumps(config.schema(), indent=2))
    return 0


def _config_explain(arguments: Arguments) -> int:
    from router.forecast import DAYS, forecast
    from understudy import show

    settings = config.load(arguments.config)
    rows = config.explain(settings)
    newcomers = [
        {"route": name, "sessions_a_day": arguments.sessions, "days": DAYS, "forecasts": found}
        for name, route in settings.routes.items()
        if (found := [dataclasses.asdict(one) for one in forecast(route.policy, list(route.arms), arguments.sessions)])
    ]
    data = {"keys": [row._asdict() for row in rows], "new_arm": newcomers}
    _print(arguments, data, lambda: show.explained(rows, newcomers))
    return 0


def _keys_create(arguments: Arguments) -> int:
    from gateway.auth import new_key

    secret, key = new_key(arguments.tenant, arguments.role, time.time(), arguments.text)
    _store(arguments).put_key(key)
    data = {"id": key.id, "tenant": key.tenant, "role": key.role, "text": key.text, "key": secret}
    _print(arguments, data, lambda: print(f"{secret}\n{key.id} for tenant {key.tenant}: shown this once, keep it safe"))
    return 0


def _keys_list(arguments: Arguments) -> int:
    from understudy import show

    rows = [
        {"id": k.id, "tenant": k.tenant, "role": k.role, "text": k.text, "created": k.created, "revoked": k.revoked}
        for k in _store(arguments).list_keys()
    ]
    _print(arguments, rows, lambda: show.keys(rows))
    return 0


def _keys_revoke(arguments: Arguments) -> int:
    import msgspec

    store = _store(arguments)
    for key in store.list_keys():
        if key.id == arguments.id:
            store.put_key(msgspec.structs.replace(key, revoked=True))
            _print(arguments, {"id": key.id, "revoked": True}, lambda: print(f"{arguments.id} is revoked"))
            return 0
    print(f"understudy: no key {arguments.id}; `understudy keys list` shows them", file=sys.stderr)
    return 1


def _keys_rotate(arguments: Arguments) -> int:
    from gateway.auth import rotate_tokens

    try:
        names = rotate_tokens(_store(arguments), time.time())
    except ValueError as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 1
    data = {"signs_next": names[0], "still_valid": names[1:]}
    _print(arguments, data, lambda: print("a new key signs feedback tokens within a minute; the last one stays valid"))
    return 0


def _signals(arguments: Arguments) -> int:
    import getpass

    from telemetry.journal import Journal
    from understudy import heard, show

    journal = Journal(config.load(arguments.config).journal_path)
    now = time.time()
    if arguments.text:
        journal.note_read(now, f"{getpass.getuser()} at the command line", f"signals of {arguments.since:g} s")
    rows = heard.newest(journal, now - arguments.since, arguments.limit, arguments.kind, text=arguments.text)
    _print(arguments, rows, lambda: show.signals(rows))
    return 0


def _forget(arguments: Arguments) -> int:
    from understudy import show
    from understudy.forget import forget

    _, store, journal = _opened(arguments)
    found = forget(journal, store, arguments.tenant, arguments.user).shown()
    _print(arguments, found, lambda: show.summary(found))
    return 0


def _mask(arguments: Arguments) -> int:
    from telemetry.journal import Journal
    from understudy import mask, show

    try:
        function = mask.load(arguments.using)
    except ValueError as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 1
    journal = Journal(config.load(arguments.config).journal_path)
    looked, scrubbed = mask.mask_all(journal, function, time.time() - arguments.since)
    found = {"facts": looked, "scrubbed": scrubbed}
    _print(arguments, found, lambda: show.summary(found))
    return 0


def _feedback_send(arguments: Arguments) -> int:
    from understudy.send import send

    names = ("response_id", "trace_id", "session_id", "kind", "value", "name", "text", "user", "event_id")
    item = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        status, said = send(arguments.base_url, item, arguments.api_key, arguments.tenant)
    except OSError as error:
        print(f"understudy: {arguments.base_url} cannot be reached: {error}", file=sys.stderr)
        return 1
    if status != 202:
        print(f"understudy: refused with {status}: {said['error']['message']}", file=sys.stderr)
        return 1
    _print(arguments, said, lambda: print(f"taken as {said['ids'][0]}"))
    return 0


def _store(arguments: Arguments) -> Store:
    from understudy.compose import open_store

    return open_store(config.load(arguments.config))


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
    _print(arguments, summary, lambda: show.summary(summary))
    return 1 if tally.failures else 0


def _demo(arguments: Arguments) -> int:
    from understudy.demo.story import tell

    return tell(arguments.sessions, arguments.cache, arguments.keep, as_json=arguments.json)
