"""That whoever asked is told when its client leaves: by a bare ASGI application behind our protocol, over sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import pytest
import uvicorn
from conftest import eventually

from gateway.asgi import client_of
from gateway.http import protocol

HELLO = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Message = MutableMapping[str, Any]


class Watcher:
    """An application that asks to be told, once it knows that its client left or without waiting for that."""

    def __init__(self) -> None:
        self.wait_first = False
        self.answer = False
        self.watching = 0
        self.told = 0

    async def __call__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        while self.wait_first and (await receive())["type"] != "http.disconnect":
            pass
        client = client_of(scope, receive, send)
        client.leaving(self._tell)
        self.watching += 1
        if self.answer:
            client.leaving(None)
            client.respond(204, [], b"")
        else:
            while (await receive())["type"] != "http.disconnect":
                pass

    def _tell(self) -> None:
        self.told += 1


@pytest.fixture
def watcher() -> Iterator[tuple[Watcher, int]]:
    app = Watcher()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=protocol(8192), loop="uvloop", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield app, listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    listening.close()


def test_a_client_that_leaves_is_told_of(watcher: tuple[Watcher, int]) -> None:
    app, port = watcher
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(HELLO)
        eventually(lambda: app.watching)
        assert app.told == 0
    eventually(lambda: app.told == 1)


def test_a_client_that_left_before_anybody_asked_is_told_of_at_once(watcher: tuple[Watcher, int]) -> None:
    app, port = watcher
    app.wait_first = True
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(HELLO)
    eventually(lambda: app.watching)
    assert app.told == 1


def test_a_client_that_leaves_after_its_answer_is_nobodys_business(watcher: tuple[Watcher, int]) -> None:
    app, port = watcher
    app.answer = True
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.sendall(HELLO)
            assert wire.recv(1000).startswith(b"HTTP/1.1 204")
    eventually(lambda: app.watching == 2)
    assert app.told == 0
