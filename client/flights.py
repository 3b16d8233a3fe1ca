"""The session's record of requests under way: what the broker was told, what came back. It decides nothing."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from random import Random

from headrace.client.events import Spec
from headrace.messages import Ack, Request, pack_tokens

__all__ = ["Choice", "Flight", "Flights"]


class Choice:
    """One continuation: the tokens delivered so far and the attempt that the last of them came from."""

    __slots__ = ("acked", "attempt", "ended", "output")

    def __init__(self) -> None:
        self.output = array("I")
        self.attempt = 0
        self.acked = 0
        self.ended = False


class Flight:
    """A request under way.

    Attributes:
        ticket: the caller's name for it.
        id: its name on the wire; a new one for each try.
        choices: its continuations.
        accepted: the broker knows it.
        sent_at: when it was last submitted under this id.
        resume_at: when to submit it again after an error that may pass.
        tries: tries after the first.
        unknown: times that the broker did not know it, without a token in between.
        started: when the caller asked.
        since: when waiting for a broker began.
        news_at: when the broker last gave a sign of it, or was last asked for one.
        progress_at: when the last token came.
        ask_again_at: when a gap may be asked for again.
        deadline: when it must be complete.
    """

    __slots__ = (
        "accepted",
        "ask_again_at",
        "choices",
        "deadline",
        "id",
        "news_at",
        "progress_at",
        "resume_at",
        "sampling",
        "sent_at",
        "since",
        "spec",
        "started",
        "ticket",
        "tries",
        "unknown",
    )

    def __init__(self, ticket: int, spec: Spec, random: Random, now: float) -> None:
        self.ticket = ticket
        self.spec = spec
        self.id = random.randbytes(16)
        # The seed is drawn here, not by the broker: whichever broker runs the rest must draw the same tokens.
        self.sampling = {"seed": random.getrandbits(63), **spec.sampling}
        self.choices = [Choice() for _ in range(spec.choices)]
        self.accepted = False
        self.sent_at: float | None = None
        self.resume_at: float | None = None
        self.tries = 0
        self.unknown = 0
        self.started = self.since = self.news_at = self.progress_at = now
        self.ask_again_at = now
        self.deadline = None if spec.timeout is None else now + spec.timeout

    @property
    def has_tokens(self) -> bool:
        """Whether the caller was given any."""
        return any(choice.output for choice in self.choices)

    @property
    def fresh(self) -> bool:
        """Whether the broker should be told of it now."""
        return not self.accepted and self.resume_at is None

    def submitted_before(self, then: float) -> bool:
        """Whether it was submitted before that time and nothing was heard of it since."""
        return self.fresh and self.sent_at is not None and self.sent_at <= then

    def progress(self, now: float) -> None:
        """A token or an end came."""
        self.news_at = self.progress_at = now
        self.unknown = 0

    def submission(self, now: float) -> Request:
        """The request as the broker should run it from here."""
        self.sent_at = self.news_at = now
        begun = self.has_tokens
        return Request(
            id=self.id,
            model=self.spec.model,
            prompt=self.spec.prompt,
            sampling=self.sampling,
            budget_ms=None if self.deadline is None else max(1, int((self.deadline - now) * 1000)),
            output=tuple(pack_tokens(choice.output) for choice in self.choices) if begun else (),
            attempt=max(choice.attempt for choice in self.choices),
            fingerprint=self.spec.fingerprint if begun else "",
            task=self.spec.task,
            pooling=self.spec.pooling,
        )

    def positions(self, now: float) -> Iterator[Ack]:
        """Where each continuation goes on."""
        self.news_at = now
        for number, choice in enumerate(self.choices):
            choice.acked = len(choice.output)
            yield Ack(self.id, number, len(choice.output), choice.ended)

    def wait_until(self, then: float, random: Random) -> None:
        """Try again at that time, under a new id: the broker may remember the old one together with its error."""
        self.id = random.randbytes(16)
        self.accepted = False
        self.sent_at = None
        self.resume_at = self.since = then
        for choice in self.choices:
            choice.attempt = 0


class Flights:
    """All requests under way, by the caller's name for them and by the broker's."""

    def __init__(self) -> None:
        self._by_ticket: dict[int, Flight] = {}
        self._by_id: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_ticket)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._by_ticket.values()))

    def add(self, flight: Flight) -> None:
        """One more."""
        self._by_ticket[flight.ticket] = self._by_id[flight.id] = flight

    def get(self, ticket: int) -> Flight | None:
        """The one of this ticket."""
        return self._by_ticket.get(ticket)

    def find(self, id: bytes) -> Flight | None:
        """The one that the broker calls so."""
        return self._by_id.get(id)

    def remove(self, flight: Flight) -> None:
        """It is over."""
        del self._by_ticket[flight.ticket]
        del self._by_id[flight.id]

    def postpone(self, flight: Flight, then: float, random: Random) -> None:
        """Try it again at that time, under a new name."""
        del self._by_id[flight.id]
        flight.wait_until(then, random)
        self._by_id[flight.id] = flight

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert len(self._by_id) == len(self._by_ticket)
        for ticket, flight in self._by_ticket.items():
            assert flight.ticket == ticket
            assert self._by_id[flight.id] is flight
            assert not all(choice.ended for choice in flight.choices)
