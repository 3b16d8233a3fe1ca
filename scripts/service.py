"""A part of the pool that is started again when it dies: the broker or the gateway, as a child process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from headrace.errors import InternalError
from headrace.processes import Child, describe_exit

__all__ = ["Service"]

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 15.0  # seconds before it is started again, doubling
_STABLE = 60.0  # after a life this long the next delay is the first one again


class Service:
    """One supervised child.

    Args:
        name: for people, `ps` and `top`.
        make: a new child; told what the last one said when it was ready, so that the next takes the same address.
        say: takes lines for people.
        clock: seconds that only go forward.

    Attributes:
        ready: whether it has been ready, if only once.
        facts: what it said when it was ready; empty before.
        child: the process of the present, None between two.
        restart_at: when the next one starts, by the clock.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[dict[str, Any]], Child],
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.ready = False
        self.facts: dict[str, Any] = {}
        self.child: Child | None = None
        self.restart_at: float | None = None
        self._make = make
        self._say = say
        self._clock = clock
        self._started_at = 0.0
        self._delay = _FIRST_DELAY
        self._ending = False

    def start(self) -> None:
        """Start it."""
        self.restart_at = None
        self._started_at = self._clock()
        self.child = self._make(self.facts).start()

    def turn(self) -> None:
        """Hear what it says, and start it again when it is time to.

        Raises:
            HeadraceError: it ended before it was ever ready.
        """
        if self.restart_at is not None and self._clock() >= self.restart_at:
            self.start()
        while self.child is not None and (message := self.child.receive()) is not None:
            if message.pop("kind") == "ready":
                if self.ready:
                    self._say(f"The {self.name} is back.")
                self.ready, self.facts = True, message
        if self.child is not None and self.child.closed:
            self._ended(self.child)

    def _ended(self, child: Child) -> None:
        code = child.join(5.0)
        self.child = None
        if self._ending:
            return
        if not self.ready:
            raise child.error or InternalError(f"The {self.name} {describe_exit(code)} before it was ready.")
        if self._clock() - self._started_at > _STABLE:
            self._delay = _FIRST_DELAY
        why = describe_exit(code) if child.error is None else f"ended: {child.error.message}"
        self._say(f"The {self.name} {why.rstrip('.')}; it starts again in {self._delay:g} s.")
        self.restart_at = self._clock() + self._delay
        self._delay = min(2 * self._delay, _LONGEST_DELAY)

    def ask_to_end(self) -> None:
        """Let it finish what it is at; it is not started again."""
        self._ending, self.restart_at = True, None
        if self.child is not None and self.child.alive:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(self.child.pid or 0, signal.SIGTERM)

    def end(self, grace: float) -> None:
        """End it, by force after `grace` seconds."""
        self._ending, self.restart_at = True, None
        if self.child is not None:
            self.child.terminate(grace)
            self.child = None
