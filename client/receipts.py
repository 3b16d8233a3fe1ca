"""Acknowledgements that the session owes the broker: gathered for a moment, said soon when a stream runs fast."""

from __future__ import annotations

from headrace.client.flights import Choice, Flight
from headrace.client.outbox import Outbox
from headrace.messages import Ack, Credit, Finish

__all__ = ["Receipts"]

_TOKENS = 64  # unconfirmed tokens of one stream after which to speak at once
_EVERY = 0.25  # seconds after which to speak in any case


class Receipts:
    """What is not yet confirmed, by request and choice.

    Attributes:
        due_at: when to say it at the latest; None if there is nothing to say.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._streams: dict[tuple[bytes, int], Choice] = {}
        self._strays: dict[tuple[bytes, int], Ack] = {}
        self.due_at: float | None = None

    def note(self, flight: Flight, number: int, now: float) -> None:
        """A choice got tokens or its end."""
        choice = flight.choices[number]
        self._streams[flight.id, number] = choice
        self._due(now)
        if len(choice.output) - choice.acked >= _TOKENS:
            self.say()

    def stray(self, finish: Finish, now: float) -> None:
        """The end of a request that is over here: it was cancelled, or this acknowledgement was lost before."""
        self._strays[finish.request, finish.choice] = Ack(finish.request, finish.choice, finish.total, True)
        self._due(now)

    def say(self) -> None:
        """Confirm everything now."""
        acks = [*self._strays.values()]
        for (id, number), choice in self._streams.items():
            choice.acked = len(choice.output)
            acks.append(Ack(id, number, choice.acked, choice.ended))
        self.clear()
        if acks:
            self._outbox.send(Credit(acks=tuple(acks)))

    def discard(self, flight: Flight) -> None:
        """The request is none any more."""
        for number in range(len(flight.choices)):
            self._streams.pop((flight.id, number), None)
        if not self._streams and not self._strays:
            self.due_at = None

    def clear(self) -> None:
        """Forget it all: on a new connection the positions are told anyway."""
        self._streams.clear()
        self._strays.clear()
        self.due_at = None

    def _due(self, now: float) -> None:
        if self.due_at is None:
            self.due_at = now + _EVERY

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert (self.due_at is not None) == bool(self._streams or self._strays)
