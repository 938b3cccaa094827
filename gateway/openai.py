"""The OpenAI wire format, as far as we read it: requests, answers (whole or as SSE) and error bodies.

Requests are parsed once, into the few fields that routing needs, and once more into raw slices by field, so that
the body sent upstream is the app's own bytes with only our fields replaced.
Specification: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from typing import Any

import msgspec

ENDPOINTS = ("chat/completions", "completions", "responses", "embeddings")


class ApiError(Exception):
    """An answer that is an error: `status` and an OpenAI-shaped body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers
        self.body = error_body(message, type, param, code)


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": type, "param": param, "code": code}})


class Metadata(msgspec.Struct, frozen=True):
    """What an app may say about a request in its body's `metadata`. OpenAI allows strings only there."""

    session_id: str | None = None
    user_id: str | None = None
    task_type: str | None = None
    task_id: str | None = None
    prompt_version: str | None = None
    knowledge_version: str | None = None
    retrieval_ids: str | tuple[str, ...] | None = None
    country: str | None = None
    consent: str | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class Message(msgspec.Struct, frozen=True):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b"null")


class Ask(msgspec.Struct, frozen=True):
    """The fields of a request that we read; all others pass through unseen."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    messages: list[Message] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    previous_response_id: str | None = None
    metadata: Metadata | None = None

    @property
    def assistant_turns(self) -> int:
        return sum(1 for m in self.messages or () if m.role == "assistant")


Fields = dict[str, msgspec.Raw]

_ask = msgspec.json.Decoder(Ask)
_fields = msgspec.json.Decoder(Fields)
_messages = msgspec.json.Decoder(list[msgspec.Raw])


def parse_request(body: bytes) -> tuple[Ask, Fields]:
    """The fields we read, and the whole body as raw slices. Raises `ApiError` 400 that names the field."""
    try:
        body.decode()  # raw slices are not looked into, and must not carry what is no text into the journal
        ask = _ask.decode(body)
        fields = _fields.decode(body)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        param = path.strip("`.").split(".")[0].split("[")[0] or None
        if "missing required field `model`" in reason:
            param, reason = "model", "`model` is missing: name one of the routes that GET /v1/models lists"
        elif param is None:
            reason = f"the body must be a JSON object: {reason}"
        else:
            reason = f"`{param}`: {reason}"
        raise ApiError(400, reason, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not ask.model:
        raise ApiError(400, "`model` is empty: name one of the routes that GET /v1/models lists", param="model")
    return ask, fields


def prompt_in(fields: Fields) -> msgspec.Raw | None:
    """What is asked, in whichever field the endpoint has it: messages, an input or a prompt."""
    return fields.get("messages") or fields.get("input") or fields.get("prompt")


def with_system_prompt(fields: Fields, endpoint: str, prompt: str) -> None:
    """Put `prompt` where the app's leading system (or developer) message stands, or in front; in place."""
    raw = msgspec.json.encode(prompt)
    if endpoint == "responses":
        fields["instructions"] = msgspec.Raw(raw)
    elif endpoint == "chat/completions" and "messages" in fields:
        messages = _messages.decode(fields["messages"]) if bytes(fields["messages"]) != b"null" else []
        first = msgspec.json.decode(messages[0], type=Message) if messages else None
        if first is not None and first.role in ("system", "developer"):
            messages = messages[1:]
        messages.insert(0, msgspec.Raw(b'{"role":"system","content":' + raw + b"}"))
        fields["messages"] = msgspec.Raw(msgspec.json.encode(messages))


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: dict[str, Any] | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    text: str | None = None
    finish_reason: str | None = None
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None


class _Response(msgspec.Struct, frozen=True):
    """The `response` object of the Responses API, whole or inside an event."""

    id: str | None = None
    status: str | None = None
    usage: Usage | None = None


class _Body(msgspec.Struct, frozen=True):
    """An answer, a chunk of one, or a Responses event: whatever of these fields is there."""

    id: str | None = None
    type: str | None = None
    delta: Any = None
    status: str | None = None
    choices: list[_Choice] = []
    output: list[dict[str, Any]] = []
    response: _Response | None = None
    usage: Usage | None = None
    error: Any = None


MOST_CHOICES = 128
"""As many as OpenAI makes."""


class Answer(msgspec.Struct):
    """What an answer's copy says; fields stay None where it does not say. Of choices the first is the answer."""

    id: str | None = None
    text: str = ""
    tool_calls: list[dict[str, Any]] = []
    finish_reason: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    failed: bool = False
    """The upstream reported an error inside a 200."""
    unreadable: bool = False
    others: dict[int, str] = {}
    """Texts of the choices beside the first, by their index."""
    ended: bool = False
    """A stream said that it is complete; what its connection did after that matters to nobody."""


_body = msgspec.json.Decoder(_Body)
_strings = msgspec.json.Decoder(list[str])
_LAST = frozenset(["response.completed", "response.incomplete", "response.failed"])


def read_answer(body: bytes) -> Answer:
    """An unary answer. Never raises: what cannot be read is said in `unreadable`."""
    answer = Answer()
    try:
        _take(answer, _body.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        answer.unreadable = True
    return answer


def read_stream(body: bytes) -> Answer:
    """The answer that an SSE stream spelled. Never raises."""
    if b"\r" in body:
        body = body.replace(b"\r\n", b"\n")
    events = body.split(b"\n\n")
    try:
        return _spelled(events, alike=True)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _spelled(events, alike=False)


def _spelled(events: list[bytes], alike: bool) -> Answer:
    """The answer, event by event.

    `alike`: nearly all events differ in one word only, so what stands around the word of the last one that was read is
    but compared, and such words are read all at once. Raises msgspec's errors where that does not do.
    """
    answer, parts, words = Answer(), list[str](), list[bytes]()
    before, after = b"", b"\n\n"  # which no event ends with
    for event in events:
        if event.endswith(after) and event.startswith(before):
            words.append(event[len(before) : -len(after)])
            continue
        data = sse_data(event)
        if data is None:
            continue
        if data == b"[DONE]":
            answer.ended = True
            continue
        try:
            chunk = _body.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            answer.unreadable = True
            continue
        parts += _strings_of(words)
        words.clear()
        word = _only_a_word(chunk)
        if word is None or answer.id is None:
            _take(answer, chunk, parts)
            continue
        parts.append(word)
        if alike:
            before, after = _around(event, word) or (before, after)
    answer.text = "".join(parts + _strings_of(words))
    return answer


def _strings_of(written: list[bytes]) -> list[str]:
    """JSON strings read; each must be one, and nothing else."""
    strings = _strings.decode(b"[%b]" % b",".join(written)) if written else []
    if len(strings) != len(written):
        raise msgspec.ValidationError("more than strings")
    return strings


def _around(event: bytes, word: str) -> tuple[bytes, bytes] | None:
    """What stands before and after the word of an event that says nothing else, if it is written as we would."""
    before, _, after = event.partition(msgspec.json.encode(word))
    try:
        data = sse_data(before + msgspec.json.encode(word + "\0") + after) or b""
        same = _only_a_word(_body.decode(data)) == word + "\0"  # the same letters may stand elsewhere in it
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return (before, after) if same else None


def sse_data(event: bytes) -> bytes | None:
    """The data of an event (https://html.spec.whatwg.org/multipage/server-sent-events.html, §9.2.6), if it has any."""
    if event[:6] == b"data: " and b"\n" not in event:  # as servers write it
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _only_a_word(chunk: _Body) -> str | None:
    """The text of a chunk that says nothing else, as nearly all of a stream do; None for any other."""
    if len(chunk.choices) != 1 or chunk.usage is not None or chunk.error is not None:
        return None
    choice = chunk.choices[0]
    if choice.index or choice.finish_reason is not None or choice.delta is None or len(choice.delta) != 1:
        return None
    word = choice.delta.get("content")
    return word if isinstance(word, str) else None


def _take(answer: Answer, body: _Body, parts: list[str] | None = None) -> None:
    answer.id = answer.id or body.id or (body.response.id if body.response else None)
    answer.failed = answer.failed or body.error is not None
    answer.ended = answer.ended or body.type in _LAST
    usage = body.usage or (body.response.usage if body.response else None)
    if usage is not None:
        answer.tokens_in = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
        answer.tokens_out = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
        cached = (usage.prompt_tokens_details or {}).get("cached_tokens")
        answer.tokens_cached = cached if isinstance(cached, int) else None
    for choice in body.choices:
        if choice.index != 0:
            _take_other(answer, choice)
            continue
        answer.finish_reason = choice.finish_reason or answer.finish_reason
        said = choice.message or choice.delta or {}
        text = choice.text if choice.text is not None else said.get("content")
        if isinstance(text, str):
            if parts is None:
                answer.text += text
            else:
                parts.append(text)
        _take_tool_calls(answer, said.get("tool_calls"))
    if parts is not None and body.type == "response.output_text.delta" and isinstance(body.delta, str):
        parts.append(body.delta)
    for item in body.output:
        content = item.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                answer.text += part["text"]
    status = body.response.status if body.response else (body.status if body.output else None)
    answer.finish_reason = status or answer.finish_reason


def _take_other(answer: Answer, choice: _Choice) -> None:
    text = choice.text if choice.text is not None else (choice.message or choice.delta or {}).get("content")
    if choice.index in answer.others or len(answer.others) < MOST_CHOICES:
        answer.others[choice.index] = answer.others.get(choice.index, "") + (text if isinstance(text, str) else "")


def _take_tool_calls(answer: Answer, calls: object) -> None:
    """Join the deltas of tool calls by their `index`; a `name` or `id` of null changes nothing."""
    if not isinstance(calls, list):
        return
    by_index = {call["index"]: call for call in answer.tool_calls}
    for place, call in enumerate(calls):
        if not isinstance(call, dict):
            continue
        index = call.get("index")
        index = index if isinstance(index, int) else place
        kept = by_index.get(index)
        if kept is None:
            kept = by_index[index] = {"index": index, "id": None, "name": "", "arguments": ""}
            answer.tool_calls = [*answer.tool_calls, kept]
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        kept["id"] = call.get("id") or kept["id"]
        kept["name"] = function.get("name") or kept["name"]
        arguments = function.get("arguments")
        kept["arguments"] += arguments if isinstance(arguments, str) else ""


class UsageFilter:
    """Takes out of a stream the one event that the app did not ask for: the usage chunk with `choices: []`.

    vLLM sends it because we asked (`stream_options.include_usage`). All other bytes leave as they came, in the same
    order; the only bytes ever held back are those of an event whose end has not arrived.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._blank = b"\n\n"  # what ends an event: vLLM's way, until the stream shows the other

    def feed(self, data: bytes) -> bytes:
        if not self._tail and b'"usage"' not in data and data.endswith(self._blank):
            return data
        data = self._tail + data
        if b"\r\n\r\n" in data:
            self._blank = b"\r\n\r\n"
        end = data.rfind(self._blank)
        if end < 0:
            self._tail = data
            return b""
        end += len(self._blank)
        self._tail, whole = data[end:], data[:end]
        if b'"usage"' not in whole:
            return whole
        events = whole.split(self._blank)
        return self._blank.join(event for event in events if not _usage_only(event))

    def end(self) -> bytes:
        """What was held back."""
        tail, self._tail = self._tail, b""
        return tail


def _usage_only(event: bytes) -> bool:
    if b'"usage"' not in event or b'"choices":' not in event:
        return False
    try:
        body = _body.decode(event.removeprefix(b"data:"))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return not body.choices and body.usage is not None
