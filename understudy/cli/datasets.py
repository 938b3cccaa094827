"""Commands about what a model learns from: `dataset build | show | export`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy import settings as config
from understudy.cli.common import Arguments, Commands, config_option, emit, json_option

if TYPE_CHECKING:
    from telemetry.journal import Journal


def add_dataset(commands: Commands) -> None:
    about = commands.add_parser("dataset", help="Build, look at and export what a model learns from.")
    verbs = about.add_subparsers(metavar="build|show|export|goldens", required=True)

    help = "Make a dataset of the journal's feedback; the same journal and policy give the same bytes."
    build = verbs.add_parser("build", help=help, description=help)
    build.set_defaults(run=_build)
    build.add_argument(
        "--policy", type=Path, metavar="FILE", help="YAML with keys of `learner.dataset` (default: the route's own)"
    )
    build.add_argument("--route", help="needed where the config has several")
    build.add_argument("--out", type=Path, help="folder for datasets (default: `datasets` in the learner's)")

    help = "What a dataset holds; with an example's id, where that one comes from. Reading text is put on record."
    show = verbs.add_parser("show", help=help, description=help)
    show.set_defaults(run=_show)
    show.add_argument("folder", type=Path, help="a dataset's folder")
    show.add_argument("example", nargs="?", help="an example's id, or how it begins")
    show.add_argument("--limit", type=int, default=20, help="examples listed, at most (default: %(default)s)")

    help = "Write a dataset in another tool's format."
    export = verbs.add_parser("export", help=help, description=help)
    export.set_defaults(run=_export)
    export.add_argument("folder", type=Path, help="a dataset's folder")
    export.add_argument("--to", choices=("huggingface", "argilla", "label-studio"), required=True, help="the format")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--users", action="store_true", help="with the users' pseudonyms")
    help = "Draft goldens of what people corrected and preferred, for an owner to review. It is put on record."
    goldens = verbs.add_parser("goldens", help=help, description=help)
    goldens.set_defaults(run=_goldens)
    goldens.add_argument("folder", type=Path, help="a dataset's folder")
    goldens.add_argument("--out", type=Path, required=True, help="YAML file to be made")
    goldens.add_argument("--limit", type=int, default=20, help="drafts, at most (default: %(default)s)")
    goldens.add_argument("--route", help="needed where the config has several")
    for verb in (build, show, export, goldens):
        config_option(verb)
        json_option(verb)


def route_named(settings: config.Settings, name: str | None) -> str:
    """The route of that name, or the only one. Raises SystemExit 2."""
    if name is None and len(settings.routes) == 1:
        return next(iter(settings.routes))
    if name not in settings.routes:
        print(f"understudy: --route must be one of {', '.join(settings.routes)}", file=sys.stderr)
        raise SystemExit(2)
    return name


def _build(arguments: Arguments) -> int:
    from learner import dataset
    from telemetry.journal import Journal
    from understudy import learning, show_learning

    settings = config.load(arguments.config)
    route = route_named(settings, arguments.route)
    policy = learning.dataset_policy(settings, route, arguments.policy)
    folder = arguments.out or learning.datasets_folder(settings, route)
    journal = Journal(settings.journal_path)
    built = dataset.build(learning.source(settings, route, journal), policy, folder)
    if not arguments.json:  # people are shown some of what was dropped
        _on_record(journal, f"what was dropped from dataset {built.folder.name}")
    data = {"folder": str(built.folder), "hash": built.hash, "manifest": built.manifest}
    emit(arguments, data, lambda: show_learning.built(built))
    return 0


def _goldens(arguments: Arguments) -> int:
    from learner import drafts, goldens, shards
    from telemetry.errors import StateError
    from telemetry.journal import Journal
    from understudy import learning

    settings = config.load(arguments.config)
    policy = learning.dataset_policy(settings, route_named(settings, arguments.route), None)
    known = goldens.load(policy.goldens)
    found = drafts.drafts(shards.read(arguments.folder), known, arguments.limit)
    _on_record(Journal(settings.journal_path), f"drafts of goldens from dataset {arguments.folder.name}")
    try:
        drafts.write(arguments.out, found)
    except FileExistsError:
        raise StateError(f"{arguments.out} is there already, maybe with somebody's review; name another file") from None
    data = {"drafts": len(found), "file": str(arguments.out)}
    emit(arguments, data, lambda: print(f"{len(found)} drafts in {arguments.out}; an owner must review each"))
    return 0


def _show(arguments: Arguments) -> int:
    from learner import shards
    from telemetry.journal import Journal
    from understudy import show_learning

    if arguments.example is not None:
        return _explain(arguments)
    manifest = shards.manifest(arguments.folder)
    _on_record(Journal(config.load(arguments.config).journal_path), f"dataset {arguments.folder.name}")
    examples = [one for _, one in zip(range(arguments.limit), shards.read(arguments.folder), strict=False)]
    data = {"manifest": manifest, "examples": [plain(one) for one in examples]}
    emit(arguments, data, lambda: show_learning.dataset(manifest, examples))
    return 0


def _on_record(journal: Journal, what: str) -> None:
    """Who is about to read what people wrote."""
    import getpass
    import time

    journal.note_read(time.time(), f"{getpass.getuser()} at the command line", what)


def _explain(arguments: Arguments) -> int:
    from learner import dataset
    from telemetry.events import to_dict
    from telemetry.journal import Journal
    from understudy import show_learning

    journal = Journal(config.load(arguments.config).journal_path)
    _on_record(journal, f"example {arguments.example}")
    found = dataset.explain(arguments.folder, arguments.example, journal)
    data = {
        "example": plain(found["example"]),
        "facts": [to_dict(fact) for fact in found["facts"]],
        "missing": found["missing"],
    }
    emit(arguments, data, lambda: show_learning.explained(found))
    return 0


def plain(example: Any) -> Any:
    from learner.examples import encode

    return json.loads(encode(example))


def _export(arguments: Arguments) -> int:
    from learner import shards
    from learner.export import FORMATS
    from telemetry.journal import Journal

    examples = list(shards.read(arguments.folder))
    _on_record(Journal(config.load(arguments.config).journal_path), f"export of dataset {arguments.folder.name}")
    written = dict(FORMATS[arguments.to](examples, arguments.out, with_users=arguments.users))
    data = {"folder": str(arguments.out), "format": arguments.to, "examples": len(examples), "written": written}
    emit(arguments, data, lambda: print(f"{written} of {len(examples)} examples for {arguments.to} in {arguments.out}"))
    return 0
