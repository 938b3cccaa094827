"""`understudy feedback send`: one feedback item to a running gateway, from a shell or a cron job."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

TIMEOUT = 10.0


def send(base_url: str, item: Mapping[str, Any], key: str | None, tenant: str | None) -> tuple[int, dict[str, Any]]:
    """The gateway's status and answer to the item. Raises `OSError` if it cannot be reached or says nonsense."""
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    if tenant:
        headers["x-understudy-tenant"] = tenant
    url = f"{base_url.rstrip('/')}/feedback"
    request = urllib.request.Request(url, json.dumps(item).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as said:
            return said.status, _read(said.read(), url)
    except urllib.error.HTTPError as error:
        return error.code, _read(error.read(), url)


def _read(body: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OSError(f"what answers at {url} is no gateway of understudy")
    return found
