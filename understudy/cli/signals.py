"""Commands about what people said and wrote: `signals`, `forget`, `mask`, `feedback`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from understudy import settings as config
from understudy.cli.common import Arguments, Commands, command, config_option, emit, json_option, opened, span


def add_signals(commands: Commands) -> None:
    signals = command(commands, "signals", _signals, "The newest signals and the answers that they are about.")
    config_option(signals)
    json_option(signals)
    signals.add_argument("--since", type=span, default="1d", metavar="SPAN", help="not older than this (default: 1d)")
    signals.add_argument("--kind", help="of this kind only")
    signals.add_argument("--limit", type=int, default=50, help="at most so many (default: %(default)s)")
    signals.add_argument("--text", action="store_true", help="with what people wrote; this is put on record")


def _signals(arguments: Arguments) -> int:
    import getpass

    from telemetry.journal import Journal
    from understudy import heard, show

    journal = Journal(config.load(arguments.config).journal_path)
    now = time.time()
    if arguments.text:
        journal.note_read(now, f"{getpass.getuser()} at the command line", f"signals of {arguments.since:g} s")
    rows = heard.newest(journal, now - arguments.since, arguments.limit, arguments.kind, text=arguments.text)
    emit(arguments, rows, lambda: show.signals(rows))
    return 0


def add_forget(commands: Commands) -> None:
    help = "Erase a user's texts and names from the journal and from datasets. The sums learned stay."
    forget = command(commands, "forget", _forget, help)
    config_option(forget)
    json_option(forget)
    forget.add_argument("--user", required=True, help="by the name that the app gives them")
    forget.add_argument("--tenant", default="default", help="whose user it is (default: default)")


def _forget(arguments: Arguments) -> int:
    from understudy import learning, show
    from understudy.forget import forget

    _, store, journal = opened(arguments)
    learners = learning.folders(config.load(arguments.config))
    found = forget(journal, store, arguments.tenant, arguments.user, learners).shown()
    emit(arguments, found, lambda: show.summary(found))
    return 0


def add_mask(commands: Commands) -> None:
    help = "Let another recogniser (Presidio's, say) go over the texts that are kept."
    mask = command(commands, "mask", _mask, help)
    config_option(mask)
    json_option(mask)
    mask.add_argument("--using", required=True, metavar="MODULE:FUNCTION", help="a function from text to masked text")
    mask.add_argument("--since", type=span, default="30d", metavar="SPAN", help="facts not older than this (30d)")


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
    emit(arguments, found, lambda: show.summary(found))
    return 0


def add_feedback(commands: Commands) -> None:
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
    json_option(send)


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


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
    emit(arguments, said, lambda: print(f"taken as {said['ids'][0]}"))
    return 0
