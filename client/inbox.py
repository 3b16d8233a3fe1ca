"""Where news wait for their reader. An event loop has an inbox of its own kind, in `headrace.client.aio`."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from headrace.client.events import News

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["Box", "Inbox", "Tagged"]

T = TypeVar("T")


class Box(Protocol):
    """An inbox of either kind; `put` is called in `loop`, or in the transport's thread if that is None."""

    @property
    def loop(self) -> AbstractEventLoop | None:
        """Whose the inbox is."""

    def put(self, item: Any) -> None:
        """Take an item; must not block or raise."""


class Inbox(Generic[T]):
    """For readers that wait in a thread of their own."""

    loop = None

    def __init__(self) -> None:
        self._queue: SimpleQueue[T] = SimpleQueue()

    def put(self, item: T) -> None:
        """Called by the transport."""
        self._queue.put(item)

    def get(self) -> T:
        """Wait for the next; the session sees to it that there always is one."""
        return self._queue.get()

    def get_all(self, *, wait: bool) -> Iterator[T]:
        """Everything that is there; at least one if it may wait."""
        if wait:
            yield self._queue.get()
        while True:
            try:
                yield self._queue.get_nowait()
            except Empty:
                return


class Tagged:
    """Puts the news of one request into an inbox that many share, with its number."""

    def __init__(self, number: int, box: Box) -> None:
        self._number = number
        self._box = box

    @property
    def loop(self) -> AbstractEventLoop | None:
        """That of the inbox."""
        return self._box.loop

    def put(self, news: News) -> None:
        """Called where the inbox wants it."""
        self._box.put((self._number, news))
