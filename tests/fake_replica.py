"""A server that has adapters as vLLM 0.32 has them, and misbehaves when told to; for what `fake_vllm` does not play."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from learner.replica import Replica

Json = dict[str, Any]
Wrong = Callable[[Json], tuple[int, object] | None]


class FakeReplica:
    """From `with` on; `wrong[path]` answers otherwise than `right`, or with None hangs up."""

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}
        self.metrics = "# TYPE vllm:lora_requests_info gauge\n"
        self.says: dict[str, list[int]] = {}
        """What each model writes, prompt and all; after a token below 0 of its own it writes zeros."""
        self.wrong: dict[str, Wrong] = {}
        self.seen: list[tuple[str, str | None, Json]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def answer(self, body: Json) -> None:
                fake.seen.append((self.path, self.headers["authorization"], body))
                wrong = fake.wrong.get(self.path)
                given = wrong(body) if wrong else fake.right(self.path, body)
                if given is None:
                    return
                said = given[1] if isinstance(given[1], str) else json.dumps(given[1])
                self.send_response(given[0])
                self.send_header("content-length", str(len(said.encode())))
                self.end_headers()
                self.wfile.write(said.encode())

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.replica = Replica(self.url)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self, path: str) -> list[Json]:
        return [body for at, _, body in self.seen if at == path]

    def right(self, path: str, body: Json) -> tuple[int, object]:
        match path:
            case "/v1/models":
                cards = [{"id": n, "root": p, "parent": "base"} for n, p in self.adapters.items()]
                return 200, {"data": [{"id": "base", "root": "/models/base", "parent": None}, *cards]}
            case "/v1/load_lora_adapter" if body["lora_name"] in self.adapters:
                return 400, error("has already been loaded", "InvalidUserInput", 400)
            case "/v1/load_lora_adapter":
                self.adapters[body["lora_name"]] = body["lora_path"]
                return 200, "Success"
            case "/v1/unload_lora_adapter":
                gone = self.adapters.pop(body["lora_name"], None)
                return (200, "Success") if gone else (404, error("cannot be found", "NotFoundError", 404))
            case "/metrics":
                return 200, self.metrics
            case "/v1/completions":
                at, most = len(body["prompt"]), body["max_tokens"]
                ids = self.says[body["model"]][at : at + most]
                lost = next((place for place, token in enumerate(ids) if token < 0), most)
                ids[lost + 1 :] = [0] * len(ids[lost + 1 :])
                return 200, {"model": body["model"], "choices": [{"token_ids": ids}]}
            case "/v1/chat/completions":
                prompt = [len(message["content"]) for message in body["messages"]]
                return 200, {"model": body["model"], "prompt_token_ids": prompt, "choices": [{"token_ids": [1]}]}
        return 404, {"detail": "Not Found"}


def error(message: str, kind: str, code: int) -> Json:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
