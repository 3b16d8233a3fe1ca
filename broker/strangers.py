"""Peers that are unknown or talk nonsense: told what is wrong, seldom enough, and forgotten soon."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from headrace.broker.events import Face
from headrace.broker.mail import Mailer
from headrace.errors import HeadraceError
from headrace.messages import Error, Reset

__all__ = ["Strangers"]

_MAX_REMEMBERED = 1024
_ANSWER_AGAIN = 1.0  # seconds between two answers to the same peer, lest nonsense be answered by nonsense
_RESET_ECHO = 5.0  # a hello this soon after a Reset answers it, and is no sign of a crash


class Strangers:
    """What was said to whom lately."""

    def __init__(self, mailer: Mailer) -> None:
        self._mailer = mailer
        self._answered: OrderedDict[Hashable, float] = OrderedDict()
        self._resets: OrderedDict[Hashable, float] = OrderedDict()
        self._replaced: OrderedDict[Hashable, float] = OrderedDict()

    def complain(self, face: Face, peer: bytes, error: HeadraceError, now: float) -> bool:
        """Tell a peer what is wrong; False if it was told a moment ago."""
        due = self._may_answer(face, peer, now)
        if due:
            self._mailer.send(face, peer, Error(error=error.to_wire()))
        return due

    def refer(self, peer: bytes, now: float) -> None:
        """Tell a leader that nobody knows its group, unless it was told a moment ago."""
        if self._may_answer(Face.WORKERS, peer, now):
            self.reset(peer, "The broker does not know this group; say GroupHello.", now)

    def reset(self, peer: bytes, reason: str, now: float) -> None:
        """Tell a leader to start over."""
        _note(self._resets, peer, now)
        self._mailer.send(Face.WORKERS, peer, Reset(reason=reason))

    def was_reset(self, peer: bytes, now: float) -> bool:
        """Whether a leader that says hello again was told to."""
        return now - self._resets.get(peer, -_RESET_ECHO) < _RESET_ECHO

    def replace(self, peer: bytes, now: float) -> None:
        """Another process took the name of this leader's group: it must not take it back, and so on for ever."""
        _note(self._replaced, peer, now)

    def was_replaced(self, peer: bytes) -> bool:
        """Whether another process took the name of this leader's group."""
        return peer in self._replaced

    def _may_answer(self, face: Face, peer: bytes, now: float) -> bool:
        key = (face, peer)
        if now - self._answered.get(key, -_ANSWER_AGAIN) < _ANSWER_AGAIN:
            return False
        _note(self._answered, key, now)
        return True

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert len(self._answered) <= _MAX_REMEMBERED
        assert len(self._resets) <= _MAX_REMEMBERED
        assert len(self._replaced) <= _MAX_REMEMBERED


def _note(times: OrderedDict[Hashable, float], key: Hashable, now: float) -> None:
    times[key] = now
    times.move_to_end(key)
    if len(times) > _MAX_REMEMBERED:
        times.popitem(last=False)
