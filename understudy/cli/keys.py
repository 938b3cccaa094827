"""`understudy keys`: API keys of apps, and what signs their tokens."""

from __future__ import annotations

import sys
import time

from understudy.cli.common import Arguments, Commands, config_option, emit, json_option, opened_store


def add_keys(commands: Commands) -> None:
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
        config_option(verb)
        json_option(verb)


def _keys_create(arguments: Arguments) -> int:
    from gateway.auth import new_key

    secret, key = new_key(arguments.tenant, arguments.role, time.time(), arguments.text)
    opened_store(arguments).put_key(key)
    data = {"id": key.id, "tenant": key.tenant, "role": key.role, "text": key.text, "key": secret}
    emit(arguments, data, lambda: print(f"{secret}\n{key.id} for tenant {key.tenant}: shown this once, keep it safe"))
    return 0


def _keys_list(arguments: Arguments) -> int:
    from understudy import show

    rows = [
        {"id": k.id, "tenant": k.tenant, "role": k.role, "text": k.text, "created": k.created, "revoked": k.revoked}
        for k in opened_store(arguments).list_keys()
    ]
    emit(arguments, rows, lambda: show.keys(rows))
    return 0


def _keys_revoke(arguments: Arguments) -> int:
    import msgspec

    store = opened_store(arguments)
    for key in store.list_keys():
        if key.id == arguments.id:
            store.put_key(msgspec.structs.replace(key, revoked=True))
            emit(arguments, {"id": key.id, "revoked": True}, lambda: print(f"{arguments.id} is revoked"))
            return 0
    print(f"understudy: no key {arguments.id}; `understudy keys list` shows them", file=sys.stderr)
    return 1


def _keys_rotate(arguments: Arguments) -> int:
    from gateway.auth import rotate_tokens

    try:
        names = rotate_tokens(opened_store(arguments), time.time())
    except ValueError as error:
        print(f"understudy: {error}", file=sys.stderr)
        return 1
    data = {"signs_next": names[0], "still_valid": names[1:]}
    emit(arguments, data, lambda: print("a new key signs feedback tokens within a minute; the last one stays valid"))
    return 0
