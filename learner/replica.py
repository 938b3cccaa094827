"""One vLLM server over plain HTTP: what it serves, what is in flight, adapters on and off, greedy answers.

As vLLM 0.32 answers: `entrypoints/openai/models/serving.py`, `entrypoints/serve/lora`, `v1/metrics/loggers.py`. Loading
is answered in plain text. An empty `model` would be answered by the base, so none is ever sent.

What can go wrong, as a tree:

ServingFailed        a replica refuses, or answers what cannot be
├── Unreachable      no answer
│   └── Silent       it took what it was asked, and did not answer in time
├── Full             as many adapters as its --max-loras
└── InUse            a session needs the version, or it is in flight
"""

from __future__ import annotations

import http.client
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from telemetry.errors import UnderstudyError

SECONDS, LOAD_SECONDS = 60.0, 300.0
"""How long a replica may be silent; adapters may come from a slow disk."""

_AWAY = (429, 502, 503, 504)
"""What a busy server, or a proxy before one that is starting, answers."""
_IN_FLIGHT = "vllm:lora_requests_info"
_SERIES = re.compile(rf"{_IN_FLIGHT}\{{(?P<labels>[^}}]*)\}} (?P<at>\S+)")
_LABEL = re.compile(r'(?:running|waiting)_lora_adapters="([^"]*)"')


class ServingFailed(UnderstudyError):
    """A replica did not do what it was asked; the message names it, why, and what to do."""


class Unreachable(ServingFailed):
    """A replica did not answer; what it was asked, it may yet have done."""


class Silent(Unreachable):
    """A replica took a request and did not answer it in time."""


class Full(ServingFailed):
    """A replica has as many adapters as it can serve at once."""


class InUse(ServingFailed):
    """A version that shall go is needed."""


class Replica(NamedTuple):
    """One vLLM server."""

    url: str
    """Without `/v1`."""
    api_key: str | None = None

    def __repr__(self) -> str:
        return f"Replica({self.url!r})"


class Listing(NamedTuple):
    """What a replica serves."""

    base: str
    adapters: dict[str, str]
    """Their names and paths."""


def listing(replica: Replica) -> Listing:
    """What `GET /v1/models` says: the base is the model without a parent."""
    status, body = _call(replica, "GET", "/v1/models", None, SECONDS)
    cards: Any = _json(replica, "/v1/models", status, body).get("data")
    try:
        base = next(card["id"] for card in cards if not card.get("parent"))
        return Listing(base, {card["id"]: str(card.get("root") or "") for card in cards if card.get("parent")})
    except (TypeError, KeyError, AttributeError, StopIteration) as error:
        raise ServingFailed(f"{replica.url}/v1/models lists no base model; is it vLLM?") from error


def in_flight(replica: Replica) -> set[str]:
    """Adapters that answers are being made with now, as of the engine's last step.

    vLLM writes a new series for each set of names, whose value is when it was so: the newest one holds. What has only
    just arrived and waits for its first step is not in it. Raises ServingFailed where there are no such metrics.
    """
    status, body = _call(replica, "GET", "/metrics", None, SECONDS)
    text = body.decode(errors="replace")
    if status != 200 or f"# TYPE {_IN_FLIGHT}" not in text:
        raise ServingFailed(
            f"{replica.url}/metrics has no {_IN_FLIGHT} (status {status}), so what is in flight is not known; "
            "start vLLM with --enable-lora and without --disable-log-stats"
        )
    series = [(float(match["at"]), match["labels"]) for match in _SERIES.finditer(text)]
    if not series:
        return set()
    lists = _LABEL.findall(max(series)[1])
    return {name for names in lists for name in names.split(",") if name}


def serves(replica: Replica, name: str, path: str) -> bool:
    """Whether an adapter is served; raises ServingFailed if its name stands for something else there."""
    has = listing(replica)
    if name == has.base:
        raise ServingFailed(f"{replica.url} serves its base as {name}; give it another --served-model-name")
    if has.adapters.get(name, path).rstrip("/") != path.rstrip("/"):
        raise ServingFailed(
            f"{replica.url} serves {name} from {has.adapters[name]}, not from {path}; a name never stands for other "
            "weights: restart that replica without it, or correct the folder that it sees"
        )
    return name in has.adapters


def load_adapter(replica: Replica, name: str, path: str) -> bool:
    """Load what is not served yet; False if somebody else did meanwhile."""
    body = {"lora_name": name, "lora_path": path}
    status, said = _call(replica, "POST", "/v1/load_lora_adapter", body, LOAD_SECONDS)
    if status == 200 and serves(replica, name, path):
        return True
    if status == 400 and serves(replica, name, path):
        return False
    if status == 404 and b"NotFoundError" in said:
        raise ServingFailed(f"{replica.url} finds no adapter at {path}; mount the versions there, or say where it is")
    if status == 404:
        raise ServingFailed(
            f"{replica.url} loads no adapters; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        )
    raise ServingFailed(f"{replica.url} does not load {name}: {_said(status, said)}")


def unload_adapter(replica: Replica, name: str) -> bool:
    """False if it was not there."""
    status, body = _call(replica, "POST", "/v1/unload_lora_adapter", {"lora_name": name}, SECONDS)
    if status not in (200, 404):
        raise ServingFailed(f"{replica.url} does not unload {name}: {_said(status, body)}")
    return status == 200


def greedy(
    replica: Replica, path: str, model: str, fields: Mapping[str, Any], seconds: float = SECONDS
) -> dict[str, Any]:
    """An answer of the likeliest tokens, with their ids, whatever the model's own defaults are. Raises Silent."""
    if not model:
        raise ValueError("no model is named; vLLM would answer with its base")
    plain = {"model": model, "temperature": 0, "repetition_penalty": 1.0, "return_token_ids": True}
    status, body = _call(replica, "POST", path, plain | dict(fields), seconds)
    said = _json(replica, path, status, body)
    if said.get("model") != model:
        raise ServingFailed(f"{replica.url} was asked for {model} and answered as {said.get('model')!r}; is it vLLM?")
    return said


def _json(replica: Replica, path: str, status: int, body: bytes) -> dict[str, Any]:
    if status != 200:
        raise ServingFailed(f"{replica.url}{path}: {_said(status, body)}")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ServingFailed(f"{replica.url}{path} answered no JSON object; is it vLLM?")
    return value


def _said(status: int, body: bytes) -> str:
    """A replica's error in its own words."""
    try:
        said = json.loads(body)
        words = said["error"]["message"] if "error" in said else said["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        words = body.decode(errors="replace").strip()
    hint = "; set its api_key" if status in (401, 403) else ""
    return f"status {status}, {str(words)[:500] or 'no words'}{hint}"


def _call(replica: Replica, method: str, path: str, body: object, seconds: float) -> tuple[int, bytes]:
    """One exchange over a connection of its own: no redirects, no proxies of the environment. Raises Unreachable."""
    parts = urlsplit(replica.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex}
    if replica.api_key:
        headers["Authorization"] = f"Bearer {replica.api_key}"
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    late: type[Unreachable] = Unreachable
    try:
        payload = None if body is None else json.dumps(body)
        connection.connect()
        late = Silent
        connection.request(method, parts.path.rstrip("/") + path, payload, headers)
        answer = connection.getresponse()
        status, said = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        what, why = f"{replica.url} does not answer {method} {path}", str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            raise late(f"{what} within {seconds:g} s (timed out); see what it does") from error
        raise Unreachable(f"{what} ({why}); see whether it runs") from error
    finally:
        connection.close()
    if status in _AWAY:
        raise Unreachable(f"{replica.url} cannot answer {method} {path} now ({_said(status, said)})")
    return status, said
