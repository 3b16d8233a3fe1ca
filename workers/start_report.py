"""Where the time of a start went: phases, one after the other, as the rank measured them. Light to import.

Each is what the start waited for; what went on beside it is counted where it was waited for, or not at all.

imports   of Python and of the libraries, since the launcher started the process
model     its config and headers, and the GPU's context
compile   kernels, by many threads, whenever that was: it is taken out of the phases it was needed in
weights   read from the files to where they stay: what was left of it after compiling
memory    the dry run of the largest step, and the KV cache
kernels   warming up
graphs    captured
broker    from warm to ready: the slowest rank, and the broker's answer
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Phase", "StartClock", "StartReport"]

_MOST = 32  # phases in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase.

    Attributes:
        name: one of those above.
        seconds: that it took.
        amount: bytes of weights, tokens of the cache, kernels, graphs; 0 if nothing was counted.
        threads: that shared the work; 0 if they were not counted.
    """

    name: str
    seconds: float
    amount: int = 0
    threads: int = 0


@dataclass(frozen=True, slots=True)
class StartReport:
    """All phases of a start, in order."""

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """From the start of the process to the end of the last phase."""
        return sum(phase.seconds for phase in self.phases)

    def then(self, phase: Phase) -> StartReport:
        """This, and one more."""
        return StartReport((*self.phases, phase))

    def to_wire(self) -> list[list[Any]]:
        """Plain values, for the pipe to the launcher."""
        return [[phase.name, phase.seconds, phase.amount, phase.threads] for phase in self.phases]

    @classmethod
    def from_wire(cls, message: Mapping[str, Any]) -> StartReport:
        """The report of a rank's message; what is not understood is left out."""
        phases = message.get("phases")
        found = []
        for entry in phases[:_MOST] if isinstance(phases, list) else ():
            match entry:
                case [str(name), float() | int() as seconds, int(amount), int(threads)] if (
                    0 <= seconds < math.inf and amount >= 0 and threads >= 0
                ):
                    found.append(Phase(name=name[:20], seconds=float(seconds), amount=amount, threads=threads))
        return cls(tuple(found))

    def __str__(self) -> str:
        """For logs, in one line."""
        return ", ".join(f"{phase.name} {phase.seconds:.1f} s" for phase in self.phases)


class StartClock:
    """Measures phases as they pass.

    Args:
        began: when the first began, by the same clock.
        clock: seconds that only go forward.
    """

    def __init__(self, began: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock() if began is None else began
        self._phases: list[Phase] = []

    def end(self, name: str, amount: int = 0) -> None:
        """What went on since the last phase, or since the beginning, was this one."""
        now = self._clock()
        self._phases.append(Phase(name=name, seconds=max(0.0, now - self._since), amount=amount))
        self._since = now

    def within(self, phase: Phase) -> None:
        """The phase under way held another, which is told apart: all of its kind so far, in one place."""
        places = [place for place, known in enumerate(self._phases) if known.name == phase.name]
        before = self._phases[places[0]].seconds if places else 0.0
        self._since += phase.seconds - before
        if places:
            self._phases[places[0]] = phase
        elif phase.seconds:
            self._phases.append(phase)

    def report(self) -> StartReport:
        """All phases that ended."""
        return StartReport(tuple(self._phases))
