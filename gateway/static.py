"""The pages: files of `gateway/pages`, read once at start. Nothing in them comes from a request."""

from __future__ import annotations

from pathlib import Path

from gateway.asgi import Receive, Scope, Send

FOLDER = Path(__file__).parent / "pages"
PATH = "/ui/"
_TYPES = {".html": b"text/html; charset=utf-8", ".css": b"text/css", ".js": b"text/javascript"}
_SAFE = [
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


class Pages:
    """The example chat at /ui/try and what it needs; `/ui/understudy.js` is the client for any page."""

    def __init__(self) -> None:
        self._files = {
            PATH + (file.stem if file.suffix == ".html" else file.name): (_TYPES[file.suffix], file.read_bytes())
            for file in FOLDER.iterdir()
            if file.suffix in _TYPES
        }

    @property
    def paths(self) -> list[str]:
        return list(self._files)

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A file, by its path; an ASGI endpoint."""
        kind, body = self._files[scope["path"]]
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *_SAFE]
        if kind == _TYPES[".js"]:
            headers.append((b"access-control-allow-origin", b"*"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
