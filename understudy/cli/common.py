"""What the commands share: how one is added, its options, and what it opens and prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from understudy import settings as config

if TYPE_CHECKING:
    from router.plan import RoutePlan
    from router.store import Store
    from telemetry.journal import Journal

Arguments = argparse.Namespace
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Wrong usage also says where the help is."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def command(commands: Commands, name: str, run: Callable[[Arguments], int], help: str) -> Parser:
    """A command that `run` carries out, without options yet."""
    added = commands.add_parser(name, help=help, description=help)
    added.set_defaults(run=run)
    return added


def config_option(to: argparse.ArgumentParser) -> None:
    to.add_argument("--config", type=Path, default=Path("understudy.yaml"), help="config file (default: %(default)s)")


def json_option(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="print JSON")


def span(text: str) -> float:
    from router.policy import seconds

    try:
        return seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def emit(arguments: Arguments, data: Any, people: Callable[[], None]) -> None:
    if arguments.json:
        print(json.dumps(data, indent=2))
    else:
        people()


def opened(arguments: Arguments) -> tuple[list[RoutePlan], Store, Journal]:
    from telemetry.journal import Journal
    from understudy.compose import open_store, route_plans

    settings = config.load(arguments.config)
    return route_plans(settings), open_store(settings), Journal(settings.journal_path)


def opened_store(arguments: Arguments) -> Store:
    from understudy.compose import open_store

    return open_store(config.load(arguments.config))
