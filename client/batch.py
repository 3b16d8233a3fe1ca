"""Many requests of one call under way: what both faces do between two waits.

What may run when is for `headrace.client.map` to say.

while not batch.over:
    take wishes, prepare and launch them
    hand out what is ready
    settle the news that came, or if the batch `waits`, that come
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from headrace.client.core import Core
from headrace.client.events import News
from headrace.client.inbox import Box, Tagged
from headrace.client.map import Outcome, Window
from headrace.client.wish import AnyWish, Collector, Ready
from headrace.errors import HeadraceError, InvalidRequestError

if TYPE_CHECKING:
    from headrace.client.text import Text

__all__ = ["Batch"]

_TAKE_FOR = 0.02  # seconds: what a slow source gave by then is launched, and what came meanwhile handed out


class Batch:
    """The items of one call; closing it cancels those that run.

    Args:
        core: of the client.
        items: read only as far as the window has room.
        window: which items run and which are done.
        wish_of: what an item asks for; raises if it is nothing that can be asked for.
        box: where the news come, as (index, news).
    """

    def __init__(
        self, core: Core, items: Iterator[Any], window: Window, wish_of: Callable[[Any], AnyWish[Ready]], box: Box
    ) -> None:
        self._core = core
        self._items = items
        self._window = window
        self._wish_of = wish_of
        self._box = box
        self._running: dict[int, tuple[int, Collector]] = {}  # by index: ticket and what came
        self._more = True

    @property
    def over(self) -> bool:
        """Whether every item was handed out."""
        return not self._more and self._window.empty

    @property
    def waits(self) -> bool:
        """Whether nothing can be started or handed out before news come."""
        return bool(self._running) and not (self._more and self._window.room)

    def take(self) -> dict[int, AnyWish[Ready]]:
        """Wishes by index, as many as there is room and time for; an item that makes none has its error already."""
        wishes: dict[int, AnyWish[Ready]] = {}
        until = time.monotonic() + _TAKE_FOR
        while self._more and self._window.room and time.monotonic() < until:
            try:
                item = next(self._items)
            except StopIteration:
                self._more = False
                break
            index = self._window.start(item)
            try:
                wishes[index] = self._wish_of(item)
            except (HeadraceError, TypeError) as error:
                self._window.finish(index, _as_headrace_error(error))
        return wishes

    def prepare(
        self, wishes: Mapping[int, AnyWish[Ready]], text: Text | None = None
    ) -> dict[int, Ready | HeadraceError]:
        """Requests or errors by index; waits for the broker if the model's text is not given. Changes nothing."""
        results: dict[int, Ready | HeadraceError] = {}
        for index, wish in wishes.items():
            try:
                results[index] = self._core.prepare(wish, text)
            except (HeadraceError, TypeError, ValueError, OverflowError) as error:
                results[index] = _as_headrace_error(error)
        return results

    def launch(self, results: Mapping[int, Ready | HeadraceError]) -> None:
        """Submit what can be, in one message."""
        good: dict[int, Ready] = {}
        for index, result in results.items():
            if isinstance(result, HeadraceError):
                self._window.finish(index, result)
            else:
                good[index] = result
        if good:
            tickets = self._core.launch([(prepared, Tagged(index, self._box)) for index, prepared in good.items()])
            for (index, prepared), ticket in zip(good.items(), tickets, strict=True):
                self._running[index] = ticket, prepared.collector()

    def ready(self) -> Iterator[Outcome]:
        """Items to hand out now."""
        return self._window.ready()

    def settle(self, index: int, news: News) -> None:
        """Add what came to its item."""
        if index not in self._running:
            return  # a stop string ended it already
        ticket, collector = self._running[index]
        collector.feed(news)
        if collector.done:
            del self._running[index]
            self._core.transport.drop(ticket)
            self._window.finish(index, collector.error or collector.completion())

    def close(self) -> None:
        """Cancel what runs."""
        for ticket, _ in self._running.values():
            self._core.transport.drop(ticket)
        self._running.clear()


def _as_headrace_error(error: Exception) -> HeadraceError:
    if isinstance(error, HeadraceError):
        return error
    return InvalidRequestError(f"The item cannot be used: {error}.", param="prompts")
