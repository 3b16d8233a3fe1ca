"""Many prompts through a bounded window, pure: what may start, what is ready to be handed out. It runs nothing.

At most `concurrency` requests run at once, and at most `_AHEAD` times as many are running or finished and not handed
out yet: an endless source and a slow reader, or one slow item at the front, never fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.client.prepare import Wish
from headrace.errors import HeadraceError, InvalidRequestError

__all__ = ["Outcome", "Window", "item_wish"]

_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item: its result, or the error that it alone met."""

    index: int
    prompt: Any
    result: Any
    error: HeadraceError | None


class Window:
    """Which items run and which are done."""

    def __init__(self, concurrency: int, *, ordered: bool) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise InvalidRequestError(
                f"concurrency is {concurrency!r}; give a whole number above 0.", param="concurrency"
            )
        self._concurrency = concurrency
        self._ordered = ordered
        self._running: dict[int, Any] = {}
        self._done: dict[int, Outcome] = {}
        self._next_in = 0
        self._next_out = 0

    @property
    def room(self) -> int:
        """How many more items may start now."""
        held = len(self._running) + len(self._done)
        return max(0, min(self._concurrency - len(self._running), _AHEAD * self._concurrency - held))

    @property
    def empty(self) -> bool:
        """Whether everything that started was handed out."""
        return not self._running and not self._done

    def start(self, prompt: Any) -> int:
        """Count an item in; returns its index."""
        index = self._next_in
        self._next_in += 1
        self._running[index] = prompt
        return index

    def finish(self, index: int, result: Any) -> None:
        """An item's end: its result or its error."""
        prompt = self._running.pop(index)
        if isinstance(result, HeadraceError):
            self._done[index] = Outcome(index, prompt, None, result)
        else:
            self._done[index] = Outcome(index, prompt, result, None)

    def ready(self) -> Iterator[Outcome]:
        """Hand out what is ready, in order if that was asked for."""
        while self._done:
            index = self._next_out if self._ordered else next(iter(self._done))
            item = self._done.pop(index, None)
            if item is None:
                return
            self._next_out += 1
            yield item


def item_wish(prompt: Any, options: Mapping[str, Any]) -> Wish:
    """One item's request: a string is a prompt, a list of maps messages, a list of numbers token ids.

    Raises:
        InvalidRequestError: it is none of these.
    """
    if isinstance(prompt, str):
        return Wish(prompt=prompt, **options)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) and prompt:
        if isinstance(prompt[0], Mapping):
            return Wish(messages=prompt, **options)
        return Wish(token_ids=prompt, **options)
    raise InvalidRequestError(
        f"an item is {type(prompt).__name__}; give a string, a list of messages or a list of token ids, not empty.",
        param="prompts",
    )
