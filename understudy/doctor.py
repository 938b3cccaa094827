"""`understudy doctor`: is everything here that a gateway needs? Each check says what to do when it fails."""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from telemetry.errors import StateError
from telemetry.journal import Journal
from understudy.compose import open_store
from understudy.settings import ConfigError, Settings, Upstream, load


class Finding(NamedTuple):
    """One check's result."""

    check: str
    ok: bool
    detail: str


def examine(config: Path) -> list[Finding]:
    """All checks; those that need a config that can be read are left out if it cannot be."""
    findings = [Finding("python", sys.version_info >= (3, 11), f"{sys.version.split()[0]} (3.11 or newer is needed)")]
    try:
        settings = load(config)
    except ConfigError as error:
        return [*findings, Finding("config", False, str(error))]
    findings.append(Finding("config", True, f"{config}: {len(settings.routes)} route(s)"))
    findings.append(_check("journal", lambda: _journal(settings)))
    findings.append(_check("state", lambda: _state(settings)))
    findings.append(_check("port", lambda: _port(settings)))
    findings += _upstreams(settings)
    return findings


def _check(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except (StateError, OSError) as error:
        return Finding(name, False, str(error))


def _journal(settings: Settings) -> str:
    journal = Journal(settings.journal_path)
    try:
        return f"{settings.journal_path}: writable, {journal.last()} facts"
    finally:
        journal.close()


def _state(settings: Settings) -> str:
    store = open_store(settings)
    try:
        began = time.perf_counter()
        store.ping()
        lease = store.holder()
        alive = lease is not None and lease.owner and lease.expires > time.time()
        controller = f"controller {lease.owner}" if alive and lease else "no controller is running"
        return f"answers in {1000 * (time.perf_counter() - began):.1f} ms; {controller}"
    finally:
        store.close()


def _port(settings: Settings) -> str:
    host, port = settings.listen.host, settings.listen.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        taken = port != 0 and probe.connect_ex((host if host not in ("0.0.0.0", "::") else "localhost", port)) == 0
    return f"{host}:{port} {'answers: a gateway (or another program) is running there' if taken else 'is free'}"


def _upstreams(settings: Settings) -> Iterator[Finding]:
    for name, route in settings.routes.items():
        wanted = {arm.model for arm in route.arms.values() if arm.provider is None}
        for upstream in route.upstreams:
            what = f"upstream of {name}"
            try:
                served = {model["id"] for model in _models(upstream)["data"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = getattr(error, "reason", None) or error
                yield Finding(what, False, f"{upstream.url}: {reason}; start it, or mend `upstreams`")
                continue
            missing = sorted(wanted - served)
            detail = f"serves {', '.join(sorted(wanted))}"
            if missing:
                detail = f"does not serve {', '.join(missing)} (it serves {', '.join(sorted(served))})"
            yield Finding(what, not missing, f"{upstream.url}: {detail}")


def _models(upstream: Upstream) -> Any:
    headers = {"authorization": f"Bearer {upstream.api_key}"} if upstream.api_key else {}
    request = urllib.request.Request(f"{upstream.url}/v1/models", headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)
