"""The streams of one HTTP request, read side by side: one per prompt, each with n choices.

Each stream is opened, read and closed in a task of its own, so whoever consumes the pieces may wait with a time limit
or go away at any moment; leaving closes the streams, which cancels them on the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from headrace.errors import HeadraceError, RequestCancelledError
from headrace.gateway.errors import as_headrace_error
from headrace.gateway.metrics import Meter

if TYPE_CHECKING:
    from headrace.client import AsyncStream, Completion, Delta

__all__ = ["Piece", "Streams"]

_AHEAD = 64  # deltas kept for a slow reader; beyond them the client library's own flow control holds the sender


class Piece(NamedTuple):
    """A delta and the number of the prompt it belongs to."""

    prompt: int
    delta: Delta


class Streams:
    """Runs the streams that `openers` open, until the last one ends, one fails, or `aclose` is called."""

    def __init__(self, openers: Sequence[Callable[[], AsyncStream]], meter: Meter) -> None:
        self.completions: list[Completion | None] = [None] * len(openers)
        self.prompt_tokens = 0
        self._meter = meter
        self._queue: asyncio.Queue[Piece | HeadraceError | None] = asyncio.Queue(_AHEAD)
        self._left = len(openers)
        self._error: HeadraceError | None = None  # told after the pieces that came before it
        self._tasks = [asyncio.create_task(self._read(index, opener)) for index, opener in enumerate(openers)]

    @property
    def done(self) -> bool:
        """Whether everything was read to its end."""
        return self._left == 0

    async def _read(self, index: int, opener: Callable[[], AsyncStream]) -> None:
        try:
            async with opener() as stream:
                counted = False
                async for delta in stream:
                    if not counted:
                        counted = True
                        self.prompt_tokens += stream.prompt_tokens or 0
                    if delta.finish_reason == "cancelled":
                        raise RequestCancelledError(
                            "The request was cancelled on the server, for example because it shut down."
                        )
                    self._meter.tokens(len(delta.token_ids))
                    await self._queue.put(Piece(index, delta))
                self.completions[index] = await stream.result()
            await self._queue.put(None)
        except Exception as error:
            await self._queue.put(as_headrace_error(error))

    async def pieces(self, timeout: float | None = None) -> list[Piece]:
        """Everything that is there, at least one piece; an empty list at the end or after `timeout` seconds.

        Raises:
            HeadraceError: a stream failed.
        """
        pieces: list[Piece] = []
        while not (self.done or pieces):
            if self._error is not None:
                raise self._error
            try:
                async with asyncio.timeout(timeout):
                    self._take(await self._queue.get(), pieces)
            except TimeoutError:
                return []
        while self._error is None and not self._queue.empty():
            self._take(self._queue.get_nowait(), pieces)
        return pieces

    def _take(self, item: Piece | HeadraceError | None, pieces: list[Piece]) -> None:
        if isinstance(item, HeadraceError):
            self._error = item
        elif item is None:
            self._left -= 1
        else:
            pieces.append(item)

    async def results(self) -> list[Completion]:
        """Read everything to its end."""
        while not self.done:
            await self.pieces()
        return [completion for completion in self.completions if completion is not None]

    async def aclose(self) -> None:
        """Close all streams; those that still run are cancelled on the server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
