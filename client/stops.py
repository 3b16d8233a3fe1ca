"""Finds stop strings in text that comes in pieces, and lets nothing out that may turn out to be part of one.

The cut is where the leftmost stop string begins in the whole text, however the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopFinder"]


class StopFinder:
    """Passes text on up to the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str, *, final: bool = False) -> str:
        """The text that is certain to come before any stop string; after a `hit` there is none.

        With `final`, nothing more will come, so beginnings of stop strings are let out as well.
        """
        if self.hit is not None:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        start, stop = self._leftmost(held)
        open_at = len(held) if final else self._first_open(held)
        # A stop string that began further left and may still complete goes before one that is already complete.
        if stop is not None and start <= open_at:
            self.hit = stop
            self._held = ""
            return held[:start]
        certain = min(start, open_at)
        self._held = held[certain:]
        return held[:certain]

    def _leftmost(self, text: str) -> tuple[int, str | None]:
        """Where the leftmost stop string begins, and which; of two at the same place the longer."""
        best: tuple[int, str | None] = (len(text), None)
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and (at < best[0] or (at == best[0] and len(stop) > len(best[1] or ""))):
                best = (at, stop)
        return best

    def _first_open(self, text: str) -> int:
        """The smallest place from which the rest of the text is the beginning of a stop string."""
        first = len(text)
        for stop in self._stops:
            longest = min(len(stop) - 1, len(text))
            for size in range(longest, len(text) - first, -1):
                if text.endswith(stop[:size]):
                    first = len(text) - size
                    break
        return first
