"""Ctrl-C, SIGTERM and a closed terminal, for commands that run until one of them comes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["catch_signals", "stop_on_signals"]

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def catch_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of each signal that asks for the end."""
    # nohup asks for SIGHUP to be ignored, and that holds.
    wanted = [n for n in _STOP if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: handle(number)) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first signal; on the second end at once with 128 + its number."""
    asked = 0

    def handle(number: int) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            os._exit(128 + number)
        stop()

    with catch_signals(handle):
        yield
