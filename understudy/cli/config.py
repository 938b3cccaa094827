"""`understudy config`: check the file, print its schema, explain every key."""

from __future__ import annotations

import dataclasses
import json

from understudy import settings as config
from understudy.cli.common import Arguments, Commands, command, config_option, emit, json_option


def add_config(commands: Commands) -> None:
    about = commands.add_parser("config", help="Check the config file, print its schema, or explain every key.")
    verbs = about.add_subparsers(metavar="check|schema|explain", required=True)
    for name, run, help in (
        ("check", _config_check, "Say what is wrong, by line and key; exit 1 if anything is."),
        ("schema", _config_schema, "Print the JSON Schema, for editors."),
        ("explain", _config_explain, "Print every key, and what each policy will do with a new arm, day by day."),
    ):
        verb = command(verbs, name, run, help)
        config_option(verb)
        json_option(verb)
    help = "judged sessions a day to expect on each route (default: 500)"
    verb.add_argument("--sessions", type=float, default=500.0, help=help)


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

    emit(arguments, data, people)
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
    emit(arguments, data, lambda: show.explained(rows, newcomers))
    return 0
