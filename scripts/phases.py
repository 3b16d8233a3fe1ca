"""The phases of a start on one changing line, drawn again every second so that a long one is seen to be alive."""

from __future__ import annotations

from headrace.scripts.progress import ProgressLine
from headrace.scripts.terminal import Terminal

__all__ = ["Phases"]


class Phases:
    """Takes what a `Progress` (headrace.workers.models) is told."""

    def __init__(self, terminal: Terminal) -> None:
        self._line = ProgressLine(terminal.beside)
        self._last: tuple[str, int, int | None] | None = None

    def __call__(self, phase: str, done: int = 0, total: int | None = None) -> None:
        """Bytes done of a phase; another phase ends the one before."""
        self._last = (phase, done, total)
        self._line(*self._last)

    def tick(self) -> None:
        """Time passes."""
        if self._last is not None:
            self._line(*self._last)

    def end(self) -> None:
        """The last phase is over; its line stays."""
        self._last = None
        self._line.close()
