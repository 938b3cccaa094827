"""A hand-written HTTP/1.1 server that answers as vLLM does, and misbehaves when told to.

    with FakeVllm(["base", "good", "bad"]) as fake:
        fake.script(Behaviour("status", status=429, headers={"Retry-After": "7"}))
        ...
        fake.wait_for(lambda: fake.requests[0].aborted)

A behaviour holds for the next `n` inference requests (`n=None`: for all). A request may also ask for one itself, by a
last user message that begins with `!kind:` or `!kind:number`: `!status:503`, `!die_mid_stream:2`, `!slow:0.01`.
The wire shapes follow vllm 0.32, `entrypoints/openai`: an error in a stream comes as a data chunk and then `[DONE]`.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

Kind = Literal[
    "normal", "reasoning", "status", "refuse", "close_before_answer", "hang_before_first_byte", "hang_mid_stream",
    "die_mid_stream", "die_mid_body", "error_chunk_mid_stream", "garbage", "bad_json", "split", "slow", "raw_stream",
    "early_close_keepalive",
]  # fmt: skip
Found = TypeVar("Found")
Json = dict[str, Any]
MAGIC = re.compile(rf"!({'|'.join(get_args(Kind))}):([0-9.]*)")
INFERENCE = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"}
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Behaviour:
    kind: Kind = "normal"
    n: int | None = 1  # None: until `clear()`
    path: str | None = None  # None: any of INFERENCE; otherwise this path alone
    model: str | None = None  # only requests that name this model
    status: int = 500
    body: object = None  # `status`: any JSON; None: an error as vLLM words it
    headers: dict[str, str] = field(default_factory=dict)  # extra ones, `status` only
    after: int = 2  # *_mid_stream: SSE events sent before it happens
    data: bytes = b""  # `split`, `raw_stream`: the body; `garbage`: what to send
    offsets: tuple[int, ...] = ()  # `split`: where to cut; none: after every byte
    delay: float = 0.0  # seconds between chunks: `slow` and `split`
    text: str = "Let me think … 考"  # `reasoning`
    reset: bool = False  # close by RST rather than FIN
    when_reused: bool = False  # `early_close_keepalive`: close on the next request's first byte, not at once

    def asked(self, number: str) -> Behaviour:
        """The same with the number of a `!kind:number` prefix in the option that matters to this kind."""
        if not number:
            return replace(self, delay=0.02) if self.kind == "slow" else self
        if self.kind in ("slow", "split"):
            return replace(self, delay=float(number))
        return replace(self, status=int(number)) if self.kind == "status" else replace(self, after=int(number))


@dataclass(eq=False)
class Recorded:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    connection: int  # equal for requests that came over one kept-alive connection
    aborted: bool = False  # the client left before the answer ended
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            return {}


class HangUp(Exception):
    """Close the connection now; the argument says whether by RST."""


# What vLLM would say: pure functions of the request.


def answer_text(model: str, asked: str) -> str:
    return f"{model} says: {asked} — naïve 🙂 日本語 👩‍🚀 done."


def vector(model: str, text: str, size: int = 8) -> list[float]:
    """Deterministic, and exact in float32, so that both encodings compare equal."""
    return [((sum(f"{model}{text}".encode()) * (i + 3)) % 257) / 256 for i in range(size)]


def last_user(body: Any) -> str:
    """The text of the last user message, prompt or input; "" where there is none."""
    if not isinstance(body, dict):
        return ""
    turns = body.get("messages") or body.get("prompt") or body.get("input") or ""
    if isinstance(turns, list):
        turns = next((t for t in reversed(turns) if not isinstance(t, dict) or t.get("role") == "user"), "")
    content = turns.get("content") if isinstance(turns, dict) else turns
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def error(message: str, kind: str, code: int, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(value: Json) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


@dataclass(frozen=True)
class Answer:
    """One generation, in each of its wire shapes."""

    model: str
    body: Json
    request_id: str
    reasoning: str = ""

    @property
    def tokens(self) -> list[str]:
        limit = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        return re.findall(r"\S+\s*", answer_text(self.model, last_user(self.body)))[:limit]

    @property
    def tool_call(self) -> Json | None:
        tools, messages = self.body.get("tools"), self.body.get("messages") or [{}]
        if not tools or self.body.get("tool_choice") == "none" or messages[-1].get("role") == "tool":
            return None
        function = {"name": tools[0]["function"]["name"], "arguments": dumps({"q": last_user(self.body)}).decode()}
        return {"id": f"call_{self.request_id}", "type": "function", "function": function}

    @property
    def usage(self) -> Json:
        asked, said = max(1, len(last_user(self.body).split())), len(self.tokens)
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    @property
    def finish(self) -> str:
        if self.tool_call:
            return "tool_calls"
        return "stop" if "".join(self.tokens) == answer_text(self.model, last_user(self.body)) else "length"

    def head(self, prefix: str, kind: str) -> Json:
        return {"id": prefix + self.request_id, "object": kind, "created": int(time.time()), "model": self.model}

    def chat(self) -> Json:
        call, text = self.tool_call, "".join(self.tokens)
        message = {"role": "assistant", "content": None if call else text, "tool_calls": [call] if call else []}
        message["reasoning"] = self.reasoning or None
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish}
        return self.head("chatcmpl-", "chat.completion") | {"choices": [choice], "usage": self.usage}

    def completion(self) -> Json:
        choice = {"index": 0, "text": "".join(self.tokens), "logprobs": None, "finish_reason": self.finish}
        return self.head("cmpl-", "text_completion") | {"choices": [choice], "usage": self.usage}

    def response(self, status: str = "completed") -> Json:
        usage = {"input_tokens": self.usage["prompt_tokens"], "output_tokens": len(self.tokens)}
        usage |= {"total_tokens": self.usage["total_tokens"]}
        part = {"type": "output_text", "text": "".join(self.tokens), "annotations": []}
        message = {"id": f"msg_{self.request_id}", "type": "message", "role": "assistant", "status": status}
        done = status == "completed"
        head = self.head("resp_", "response")
        head["created_at"] = head.pop("created")
        return head | {
            "status": status, "output": [message | {"content": [part]}] if done else [], "error": None,
            "usage": usage if done else None, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
        }  # fmt: skip

    def embeddings(self) -> Json:
        given = self.body.get("input") or ""
        data = []
        for i, text in enumerate(given if isinstance(given, list) else [given]):
            floats = vector(self.model, str(text))
            value: object = floats
            if self.body.get("encoding_format") == "base64":
                value = base64.b64encode(struct.pack(f"<{len(floats)}f", *floats)).decode()
            data.append({"index": i, "object": "embedding", "embedding": value})
        usage = {"prompt_tokens": len(data), "total_tokens": len(data), "completion_tokens": 0}
        return self.head("embd-", "list") | {"data": data, "usage": usage}

    def chat_events(self) -> list[bytes]:
        deltas: list[Json] = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning": word} for word in re.findall(r"\S+\s*", self.reasoning)]
        if call := self.tool_call:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            deltas.append({"tool_calls": [call | {"index": 0, "function": {"name": name, "arguments": ""}}]})
            parts = (arguments[: len(arguments) // 2], arguments[len(arguments) // 2 :])
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in parts]
        else:
            deltas += [{"content": token} for token in self.tokens]
        nothing: Json = {"logprobs": None, "finish_reason": None}
        choices = [{"index": 0, "delta": delta} | nothing for delta in deltas]
        choices.append({"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": self.finish})
        return self._events(self.head("chatcmpl-", "chat.completion.chunk"), choices)

    def completion_events(self) -> list[bytes]:
        tokens = self.tokens
        ends = [None] * (len(tokens) - 1) + [self.finish]
        choices = [{"index": 0, "text": t, "logprobs": None, "finish_reason": end} for t, end in zip(tokens, ends)]  # noqa: B905
        return self._events(self.head("cmpl-", "text_completion"), choices)

    def _events(self, head: Json, choices: list[Json]) -> list[bytes]:
        events = [sse(head | {"choices": [choice]}) for choice in choices]
        if (self.body.get("stream_options") or {}).get("include_usage"):
            events.append(sse(head | {"choices": [], "usage": self.usage}))
        return [*events, DONE]

    def response_events(self) -> list[bytes]:
        """Named events, and no `[DONE]`."""
        where = {"item_id": f"msg_{self.request_id}", "output_index": 0, "content_index": 0}
        events: list[Json] = [{"type": "response.created", "response": self.response("in_progress")}]
        deltas = ({"type": "response.output_text.delta", "delta": token, "logprobs": []} for token in self.tokens)
        events += [delta | where for delta in deltas]
        text = "".join(self.tokens)
        events.append({"type": "response.output_text.done", "text": text, "logprobs": []} | where)
        events.append({"type": "response.completed", "response": self.response()})
        return [f"event: {e['type']}\n".encode() + sse(e | {"sequence_number": i}) for i, e in enumerate(events)]

    def shapes(self, path: str) -> tuple[Json, list[bytes]]:
        """The unary body and the stream's events for this path."""
        if path == "/v1/chat/completions":
            return self.chat(), self.chat_events()
        if path == "/v1/completions":
            return self.completion(), self.completion_events()
        return (self.response(), self.response_events()) if path == "/v1/responses" else (self.embeddings(), [])


class Wire(asyncio.StreamReaderProtocol):
    """A connection's streams, plus an event for the client's leaving, seen even while nothing is being read."""

    def __init__(self, serve: Callable[[Wire], None]) -> None:
        self.reader = asyncio.StreamReader(limit=2**24)
        self.gone = asyncio.Event()
        self.number = 0
        super().__init__(self.reader, lambda _, writer: self._open(serve, writer))

    def _open(self, serve: Callable[[Wire], None], writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        serve(self)

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        super().connection_lost(exc)

    def close(self, reset: bool = False) -> None:
        if reset and not self.writer.is_closing():
            linger = struct.pack("ii", 1, 0)
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.writer.transport.abort()
        self.writer.close()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        """One HTTP chunk in one TCP write (b"" ends the body)."""
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def head(self, status: int, kind: str, length: int | None = None, **headers: str) -> None:
        framing = {"transfer-encoding": "chunked"} if length is None else {"content-length": str(length)}
        lines = {"server": "uvicorn", "content-type": kind} | framing | headers
        first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        await self.send((first + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode())

    async def unary(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        await self.head(status, kind, len(body), **headers)
        await self.send(body)

    async def request(self) -> Recorded:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        method, path, _ = first.split(" ")
        headers: dict[str, str] = {}
        for name, _, value in (line.partition(":") for line in lines):
            known = headers.get(name.lower())
            headers[name.lower()] = value.strip() if known is None else f"{known}, {value.strip()}"
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = b"".join([part async for part in self._chunks()])
        else:
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Recorded(method, path, headers, body, self.number)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readline()


class FakeVllm:
    """The server, in a thread of its own from `start()` (or `with`) to `stop()`; a restart keeps the port."""

    def __init__(self, models: list[str], port: int = 0) -> None:
        self.models, self.port = models, port
        self._command_line = models
        self.refused = 0  # connections closed as soon as accepted
        self.hanging = 0  # requests held by a hang_* behaviour now
        self._requests: list[Recorded] = []
        self._script: list[tuple[Behaviour, list[int]]] = []  # with the uses left; an empty list: without end
        self._change = threading.Condition(threading.RLock())
        self._numbers = itertools.count(1)
        self._wires: dict[Wire, asyncio.Task[None]] = {}

    # For the test's thread.

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Recorded]:
        with self._change:
            return list(self._requests)

    @property
    def connections(self) -> int:
        return len(self._wires)

    def start(self) -> Self:
        up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(up)), name="fake-vllm", daemon=True)
        self._thread.start()
        if not up.wait(10):
            raise RuntimeError("the fake vLLM did not come up")
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    def load(self, model: str) -> None:
        """Serve one more model, as by `POST /v1/load_lora_adapter`."""
        self.models = [*self.models, model]

    def forget(self, model: str) -> None:
        """Serve it no more, as after an unload."""
        self.models = [one for one in self.models if one != model]

    def restart(self) -> None:
        """As a process that is started anew: connections break, and what was loaded later is gone."""
        self.stop()
        self.models = self._command_line
        self.start()

    def asked(self, model: str | None = None) -> list[Recorded]:
        """The inference requests, of one model or all."""
        return [r for r in self.requests if r.path in INFERENCE and model in (None, r.json.get("model"))]

    def script(self, *behaviours: Behaviour) -> None:
        """Queue behaviours; the first that fits a request holds."""
        with self._change:
            self._script += [(b, [] if b.n is None else [b.n]) for b in behaviours]

    def clear(self) -> None:
        with self._change:
            self._script.clear()

    def release(self) -> None:
        """Let the requests that hang now go on to their normal answer."""
        self._loop.call_soon_threadsafe(self._let_go)

    def wait_for(self, predicate: Callable[[], Found], timeout: float = 5.0) -> Found:
        """What the predicate returned when first true; it is asked again whenever something here changes."""
        with self._change:
            found = self._change.wait_for(predicate, timeout)
        if not found:
            raise AssertionError(f"not within {timeout} s; requests: {self._requests}")
        return found

    # For the server's thread.

    async def _main(self, up: threading.Event) -> None:
        self._loop, self._stopping, self._released = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        server = await self._loop.create_server(lambda: Wire(self._accept), "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        up.set()
        await self._stopping.wait()
        server.close()
        for task in self._wires.values():
            task.cancel()
        while self._wires:
            await asyncio.wait(self._wires.values())
            await asyncio.sleep(0)
        await server.wait_closed()

    def _let_go(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    def _tell(self, **changes: int) -> None:
        with self._change:
            for name, by in changes.items():
                setattr(self, name, getattr(self, name) + by)
            self._change.notify_all()

    def _take(self, fits: Callable[[Behaviour], bool]) -> Behaviour | None:
        with self._change:
            for entry in self._script:
                behaviour, left = entry
                if fits(behaviour):
                    if left:
                        left[0] -= 1
                    if left == [0]:
                        self._script.remove(entry)
                    return behaviour
        return None

    def _accept(self, wire: Wire) -> None:
        wire.number = next(self._numbers)
        if refusal := self._take(lambda b: b.kind == "refuse"):
            wire.close(refusal.reset)
            self._tell(refused=1)
            return
        task = self._wires[wire] = self._loop.create_task(self._converse(wire))
        task.add_done_callback(lambda _: self._left(wire))

    def _left(self, wire: Wire) -> None:
        del self._wires[wire]
        self._tell()

    async def _converse(self, wire: Wire) -> None:
        """Request after request, until either side hangs up."""
        gone = self._loop.create_task(wire.gone.wait())
        try:
            while True:
                record = await wire.request()
                with self._change:
                    self._requests.append(record)
                self._tell()
                answer = self._loop.create_task(self._answer(wire, record))
                try:
                    await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                    record.aborted = not answer.done() or isinstance(answer.exception(), ConnectionError)
                finally:
                    answer.cancel()
                    await asyncio.wait({answer})
                    record.ended.set()
                    self._tell()
                if record.aborted:
                    return
                behaviour = answer.result()
                if behaviour.kind == "early_close_keepalive":
                    if behaviour.when_reused:
                        await wire.reader.read(1)
                    raise HangUp(behaviour.reset)
                if record.headers.get("connection", "").lower() == "close":
                    return
        except asyncio.CancelledError:
            wire.writer.transport.abort()
            raise
        except HangUp as how:
            wire.close(reset=bool(how.args[0]))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left
        finally:
            gone.cancel()
            wire.close()

    def _behaviour(self, path: str, body: Json) -> Behaviour:
        if asked := MAGIC.match(last_user(body)):
            kind: Any = asked[1]
            return Behaviour(kind).asked(asked[2])
        fits_path = {path, None} if path in INFERENCE else {path}
        return self._take(lambda b: b.path in fits_path and b.model in {None, body.get("model")}) or Behaviour()

    async def _hang(self) -> None:
        self._tell(hanging=1)
        try:
            await self._released.wait()
        finally:
            self._tell(hanging=-1)

    async def _answer(self, wire: Wire, record: Recorded) -> Behaviour:
        path, body = record.path.partition("?")[0], record.json
        body = body if isinstance(body, dict) else {}
        behaviour = self._behaviour(path, body)
        match behaviour.kind:
            case "refuse" | "close_before_answer":
                raise HangUp(behaviour.reset)
            case "garbage":
                await wire.send(behaviour.data or b"\x16\x03\x01 this is no HTTP\r\n\r\n")
                raise HangUp(behaviour.reset)
            case "hang_before_first_byte":
                await self._hang()
            case "status":
                said = error("told to fail", "InternalServerError", behaviour.status)
                given = said if behaviour.body is None else behaviour.body
                await wire.unary(behaviour.status, dumps(given), **behaviour.headers)
                return behaviour
            case "bad_json":
                await wire.unary(200, b'{"id": "chatcmpl-')
                return behaviour
            case "raw_stream":
                await self._pieces(wire, [behaviour.data], "text/event-stream; charset=utf-8", 0)
                return behaviour
        if record.method == "POST" and path in INFERENCE:
            await self._infer(wire, record, path, body, behaviour)
        else:
            await self._page(wire, record.method, path)
        return behaviour

    async def _page(self, wire: Wire, method: str, path: str) -> None:
        match method, path:
            case "GET", "/health":
                await wire.unary(200, b"")
            case "GET", "/v1/models":
                listed = [{"id": m, "object": "model", "created": 0, "owned_by": "vllm"} for m in self.models]
                await wire.unary(200, dumps({"object": "list", "data": listed}))
            case "GET", "/metrics":
                running = sum(not r.ended.is_set() and r.path in INFERENCE for r in self.requests)
                line = f'vllm:num_requests_running{{engine="0",model_name="{self.models[0]}"}} {running}.0\n'
                await wire.unary(200, line.encode(), "text/plain; version=0.0.4; charset=utf-8")
            case _:
                await wire.unary(404, dumps({"detail": "Not Found"}))

    async def _infer(self, wire: Wire, record: Recorded, path: str, body: Json, behaviour: Behaviour) -> None:
        model = body.get("model") or self.models[0]
        if model not in self.models:
            missing = f"The model `{model}` does not exist."
            return await wire.unary(404, dumps(error(missing, "NotFoundError", 404, "model")))
        request_id = record.headers.get("x-request-id") or uuid.uuid4().hex
        reasoning = behaviour.text if behaviour.kind == "reasoning" else ""
        whole, events = Answer(model, body, request_id, reasoning).shapes(path)
        streamed = bool(body.get("stream") and events)
        if behaviour.kind == "split":
            data = behaviour.data or (b"".join(events) if streamed else dumps(whole))
            cuts = [0, *(behaviour.offsets or range(1, len(data))), len(data)]
            kind = "text/event-stream; charset=utf-8" if streamed else "application/json"
            pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
            await self._pieces(wire, pieces, kind, behaviour.delay)
        elif streamed and behaviour.kind != "die_mid_body":
            await self._stream(wire, events, behaviour)
        else:
            await self._whole(wire, dumps(whole), behaviour)
        return None

    async def _pieces(self, wire: Wire, pieces: list[bytes], kind: str, delay: float) -> None:
        await wire.head(200, kind)
        for piece in filter(None, pieces):
            await wire.chunk(piece)
            await asyncio.sleep(delay)
        await wire.chunk(b"")

    async def _stream(self, wire: Wire, events: list[bytes], behaviour: Behaviour) -> None:
        await wire.head(200, "text/event-stream; charset=utf-8")
        for i, event in enumerate(events):
            if i == behaviour.after and behaviour.kind.endswith("_mid_stream"):
                if behaviour.kind == "hang_mid_stream":
                    await self._hang()
                elif behaviour.kind == "die_mid_stream":
                    raise HangUp(behaviour.reset)
                else:
                    await wire.chunk(sse(error("EngineCore died", "InternalServerError", 500)))
                    await wire.chunk(DONE)
                    break
            await wire.chunk(event)
            if behaviour.kind == "slow":
                await asyncio.sleep(behaviour.delay)
        if behaviour.kind == "hang_mid_stream" and behaviour.after >= len(events):  # all is said, but not closed
            await self._hang()
        await wire.chunk(b"")

    async def _whole(self, wire: Wire, body: bytes, behaviour: Behaviour) -> None:
        """The same misbehaviours for an answer that is no stream."""
        if behaviour.kind == "error_chunk_mid_stream":
            return await wire.unary(500, dumps(error("EngineCore died", "InternalServerError", 500)))
        await asyncio.sleep(behaviour.delay)
        await wire.head(200, "application/json", len(body))
        await wire.send(body[: len(body) // 2])
        if behaviour.kind in ("die_mid_body", "die_mid_stream"):
            raise HangUp(behaviour.reset)
        if behaviour.kind == "hang_mid_stream":
            await self._hang()
        return await wire.send(body[len(body) // 2 :])
