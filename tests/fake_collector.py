"""A collector that records what it is sent over OTLP/HTTP, or hangs, or refuses as often as it is told."""

from __future__ import annotations

import gzip
import threading
import zlib
from collections import deque
from collections.abc import Sequence
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """Listens on a free port between `with` and its end."""

    def __init__(self, hang: bool = False, refuse: Sequence[int] = (), retry_after: str | None = None) -> None:
        """`refuse`: the statuses that its first answers have."""
        self.bodies: list[bytes] = []
        """Of requests that were not refused."""
        self.headers: list[Message] = []
        """Of all requests."""
        refusals = deque(refuse)
        self._go = threading.Event()
        if not hang:
            self._go.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}
                body = unpack.get(self.headers.get("content-encoding", ""), bytes)(body)
                outer.headers.append(self.headers)
                outer._go.wait(30)
                status = refusals.popleft() if refusals else 200
                if status == 200:
                    outer.bodies.append(body)
                self.send_response(status)
                if status != 200 and retry_after is not None:
                    self.send_header("retry-after", retry_after)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def let_go(self) -> None:
        self._go.set()

    def spans(self) -> list[Any]:
        """All spans that came, in order."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [s for r in requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]

    @staticmethod
    def attributes(of: Any) -> dict[str, Any]:
        """Of a span or an event."""
        return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in of.attributes}
