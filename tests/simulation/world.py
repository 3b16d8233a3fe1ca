"""A clock that jumps and dice that fall the same way every time: one seed, one history.

Nothing sleeps. What is to happen stands in a heap by the time it happens; running the world takes the next and sets
the clock. Every random choice of a simulation comes from the world's generator.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable
from random import Random

__all__ = ["World"]


class World:
    """Time, chance, and what is going to happen.

    Attributes:
        now: seconds since the beginning.
        random: the dice.
        counts: how often what happened, for tests that must know that something did.
    """

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.random = Random(seed)
        self.counts: dict[str, int] = {}
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._history = hashlib.sha256()

    def after(self, delay: float, what: Callable[[], object]) -> None:
        """Let something happen."""
        heapq.heappush(self._heap, (self.now + max(0.0, delay), next(self._order), what))

    def run(self, until: float, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Let everything happen up to a time, or until there is no more to wait for."""
        while self._heap and self._heap[0][0] <= until and not stop():
            self.now, _, what = heapq.heappop(self._heap)
            what()
        if not stop():
            self.now = until

    def chance(self, probability: float) -> bool:
        """Whether it happens this time."""
        return self.random.random() < probability

    def between(self, low: float, high: float) -> float:
        """A number."""
        return self.random.uniform(low, high)

    def note(self, what: str) -> None:
        """It happened: counted, and part of the history."""
        self.counts[what] = self.counts.get(what, 0) + 1
        self._history.update(f"{self.now:.6f} {what}\n".encode())

    @property
    def history(self) -> str:
        """A hash of all that was noted, and when."""
        return self._history.hexdigest()
