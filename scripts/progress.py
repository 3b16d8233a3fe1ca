"""Draws progress: one line that is redrawn on a terminal, plain lines every few seconds elsewhere.

    with ProgressLine() as progress:
        resolve(model, progress=progress)

It is called with a phase in words for people, bytes done and bytes in all (see `headrace.workers.models`), as often as
the caller likes. A phase without bytes is a remark. When the next phase begins, the line of the last one stays.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

__all__ = ["ProgressLine", "size"]

_REDRAW = 0.1  # seconds between two pictures on a terminal
_REPEAT = 5.0  # seconds between two lines elsewhere
_BAR = 20
_UNITS = ((1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB"), (1, "B"))


@dataclass(slots=True)
class _Phase:
    """What is shown now. Rates count from `first`, for a download that goes on has most of its bytes at once."""

    text: str
    began: float
    first: int
    done: int = 0
    total: int | None = None
    shown_at: float | None = None
    shown_done: int = -1

    @property
    def complete(self) -> bool:
        return self.total is not None and self.done >= self.total


class ProgressLine:
    """A callable that shows progress, from any thread; as a context manager it leaves the cursor on a fresh line.

    Args:
        stream: where to write; stderr by default, so that results on stdout stay clean.
        clock: seconds that only go forward.
        indent: what every line begins with.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic, indent: str = "  "
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._indent = indent
        self._redraws = self._stream.isatty()
        self._lock = threading.Lock()
        self._phase: _Phase | None = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Show where the work is."""
        now, text = self._clock(), _printable(phase)
        with self._lock:
            if self._phase is None or self._phase.text != text:
                self._finish(now)
                self._phase = _Phase(text, began=now, first=done)
            current = self._phase
            current.done, current.total = done, total
            interval = _REDRAW if self._redraws else _REPEAT
            if current.shown_at is None or now - current.shown_at >= interval:
                self._show(current, now)

    def close(self) -> None:
        """End the current line; a later call begins a new one."""
        with self._lock:
            self._finish(self._clock())

    def _finish(self, now: float) -> None:
        current, self._phase = self._phase, None
        if current is None:
            return
        if self._redraws:
            self._stream.write(f"\r\033[K{self._line(current, now)}\n")
        elif current.done != current.shown_done:
            self._stream.write(self._line(current, now) + "\n")
        self._stream.flush()

    def _show(self, current: _Phase, now: float) -> None:
        line = self._line(current, now)
        if self._redraws:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\033[K{line[:width]}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        current.shown_at, current.shown_done = now, current.done

    def _line(self, current: _Phase, now: float) -> str:
        seconds = now - current.began
        facts = [current.text]
        if current.total is not None:
            facts += self._measure(current, current.total, seconds)
        elif current.done:
            facts.append(size(current.done))
        if (current.total is None or current.complete) and seconds >= 1:
            facts.append(f"{_duration(seconds)}")
        return self._indent + "  ".join(facts)

    def _measure(self, current: _Phase, total: int, seconds: float) -> list[str]:
        if current.complete:
            return [size(total)]
        share = max(current.done, 0) / total
        facts = [f"{share:4.0%}", f"{size(current.done, like=total)} of {size(total)}"]
        if self._redraws:
            filled = int(share * _BAR)
            facts.insert(0, f"[{'#' * filled}{'.' * (_BAR - filled)}]")
        if seconds >= 1 and current.done > current.first:
            rate = (current.done - current.first) / seconds
            facts += [f"{size(rate)}/s", f"{_duration((total - current.done) / rate)} left"]
        return facts


def size(count: float, *, like: float | None = None) -> str:
    """Bytes for people; with `like` the bare number, in the unit that one is shown in."""
    divisor, unit = next((found for found in _UNITS if (count if like is None else like) >= found[0]), _UNITS[-1])
    digits = 1 if unit == "GB" else 0
    return f"{count / divisor:.{digits}f}" + (f" {unit}" if like is None else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _printable(text: str) -> str:
    """On one line and without control characters: reasons of failures come from servers."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
