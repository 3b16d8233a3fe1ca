"""uvicorn's HTTP/1.1 protocol with one more limit: the headers of a request must arrive in time.

uvicorn closes connections that idle between requests, but waits for ever for the first request, or for the rest of
headers that come one byte a minute; a few thousand of those would use up all file descriptors.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["protocol"]


def protocol(header_timeout: float) -> type[asyncio.Protocol]:
    """The protocol with this limit, in seconds."""

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def data_received(self, data: bytes) -> None:
            if self.conn.their_state is h11.IDLE:
                self._start()
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _start(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(header_timeout, self._give_up)

        def _cancel(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            self.transport.close()

    return Protocol
