"""What several of the gateway's tests need: events taken apart, raw requests, waiting for a condition."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

WAIT = 30.0  # seconds; only reached when something is broken


def chat(text: str = "hi", **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"messages": [{"role": "user", "content": text}], **more}


def events(body: str) -> list[Any]:
    """The data of each event of a stream, which must end as OpenAI's do; `[DONE]` is left out."""
    blocks = body.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith(("data: ", ": ")) and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def error_of(response: Any, status: int, code: str | None = None) -> dict[str, Any]:
    """The error in a response, whose shape is the same for all of them."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    if code is not None:
        assert body["error"]["code"] == code
    return body["error"]


def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Wait until it holds."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.005)


class Raw:
    """A connection on which a test says exactly what it wants."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, text: str | bytes) -> None:
        self._socket.sendall(text.encode() if isinstance(text, str) else text)

    def read_until(self, mark: bytes) -> bytes:
        """What comes, up to a text in it."""
        content = b""
        while mark not in content:
            part = self._socket.recv(65536)
            assert part, content
            content += part
        return content

    def read(self) -> bytes:
        """Everything up to the end of the connection."""
        content = b""
        while part := self._receive():
            content += part
        return content

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except ConnectionResetError:
            return b""
