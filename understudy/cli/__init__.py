"""The command line: arguments in, functions called, results printed. Exit 0 good, 1 failed check, 2 wrong usage.

A command is two functions in the file of its subject: one adds it and its options, the other carries it out. What that
needs it imports itself, so that `--help` stays quick. `ADDED` has the commands in the order in which help shows them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from telemetry.errors import UnderstudyError
from understudy.cli import config, datasets, gate, keys, learning, reading, rollout, serving, signals
from understudy.cli.common import Arguments, Parser
from understudy.settings import ConfigError

ADDED = (
    serving.add_serve,
    reading.add_status,
    reading.add_arms,
    serving.add_doctor,
    reading.add_rebuild,
    signals.add_signals,
    signals.add_forget,
    signals.add_mask,
    config.add_config,
    keys.add_keys,
    signals.add_feedback,
    reading.add_ope,
    datasets.add_dataset,
    learning.add_learn,
    learning.add_lineage,
    gate.add_gate,
    rollout.add_rollout,
    serving.add_replay,
    serving.add_demo,
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        run: Callable[[Arguments], int] = arguments.run
        return run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except UnderstudyError as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


def parser() -> Parser:
    top = Parser(
        prog="understudy",
        description="An OpenAI-compatible gateway that hears what users do and lets the better model version win.",
    )
    top.add_argument("--version", action="version", version=f"understudy {_version()}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for add in ADDED:
        add(commands)
    return top


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("understudy")
    except PackageNotFoundError:
        return "of a source tree"
