"""Server-sent events: frames, and a response that ends its work when the reader leaves.

Starlette's own streaming response is not enough: it ends silently on an error, and a generator that waits for a token
keeps a stream running for a reader who has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.gateway.errors import as_headrace_error, error_body, json_bytes

__all__ = ["DONE", "PING", "ClientGoneError", "EventStream", "frame", "unless_gone"]

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

T = TypeVar("T")


def frame(content: Any) -> bytes:
    """One event; JSON without line breaks, so one data line."""
    return b"data: " + json_bytes(content) + b"\n\n"


class ClientGoneError(Exception):
    """The reader closed the connection; nobody is left to be told."""


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Coroutine[Any, Any, T], receive: Callable[[], Awaitable[Any]]) -> T:
    """The result of `work`, which is cancelled (and waited for) as soon as the reader leaves.

    Raises:
        ClientGoneError: the reader left first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled if the client closes the connection before it is there."""
    return await _first(work, request.receive)


class EventStream(Response):
    """A stream of frames; an error in it becomes an error event, and `[DONE]` always ends it.

    `close` runs however the stream ends: at its end, by an error, or because the reader left.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as an ASGI application."""
        try:
            await _first(self._send_all(send), receive)
        except ClientGoneError:
            pass
        finally:
            await self._frames.aclose()
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._frames:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            await send(
                {
                    "type": "http.response.body",
                    "body": frame(error_body(as_headrace_error(error))),
                    "more_body": True,
                }
            )
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
