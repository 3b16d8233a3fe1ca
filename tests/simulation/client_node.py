"""A client in the simulation: the real pure session under watch, and a shell that does what the real one does."""

from __future__ import annotations

from random import Random

from headrace.broker.events import Face
from headrace.client.events import Close, Drop, Event, Received, Spec, Tick
from headrace.client.link import Link
from headrace.client.session import Session
from headrace.client.types import Timeouts
from headrace.messages import Message
from tests.client.probe import Outcome, Probe
from tests.simulation.network import Dealer, Router
from tests.simulation.world import World

__all__ = ["ClientNode"]


class ClientNode:
    """One client program, which may freeze, thaw, and vanish."""

    def __init__(self, world: World, router: Router, timeouts: Timeouts) -> None:
        session = Session("sim", timeouts=timeouts, retries=2, random=Random(world.random.random()))
        self.probe = Probe(session)
        self.frozen = False
        self.dealer: Dealer | None = None
        self._world = world
        self._router = router
        self._connections = 0
        self._waking_at: float | None = None

    @property
    def outcomes(self) -> dict[int, Outcome]:
        """What became of its requests."""
        return self.probe.outcomes

    @property
    def idle(self) -> bool:
        """Whether it waits for nothing and owes nothing."""
        return self.probe.session.idle

    def start(self, requests: dict[int, Spec]) -> None:
        """Submit requests."""
        if self.probe.session.link is not Link.CLOSED:
            self._obey(self.probe.start(requests, self._world.now))

    def drop(self, ticket: int) -> bytes | None:
        """The caller closed this one; its id if it had not ended."""
        outcome = self.outcomes.get(ticket)
        flight = next((flight for flight in self.probe.session.flights() if flight.ticket == ticket), None)
        if outcome is None or flight is None:
            return None
        outcome.dropped = True
        self._feed(Drop(ticket))
        return flight.id

    def lose_link(self) -> None:
        """The connection to the broker breaks."""
        if self.dealer is not None:
            self.dealer.lose()

    def shake_link(self, seconds: float) -> None:
        """Some of what is said to or by it never arrives, or twice."""
        if self.dealer is not None:
            self.dealer.shake(seconds)

    def close(self) -> None:
        """The program ends, with last words."""
        self._feed(Close())

    def vanish(self) -> None:
        """The program dies; nobody waits for its answers."""
        for outcome in self.outcomes.values():
            outcome.dropped = outcome.dropped or not outcome.over
        self.probe.session.handle(Close(), self._world.now)
        if self.dealer is not None:
            self.dealer.close()
            self.dealer = None

    def _receive(self, message: Message) -> None:
        self._feed(Received(message))
        self._feed(Tick())

    def _wake(self) -> None:
        if self.frozen:
            self._world.after(0.05, self._wake)
            return
        self._waking_at = None
        self._feed(Tick())

    def _feed(self, event: Event) -> None:
        self._obey(self.probe.feed(event, self._world.now))

    def _obey(self, said: list[Message]) -> None:
        """Open and close sockets as the session wants, and send what it says."""
        probe = self.probe
        closing = probe.session.link is Link.CLOSED
        if self.dealer is not None and closing:
            for message in said:
                self.dealer.send(message)
        if self.dealer is not None and (not probe.connected or probe.connections != self._connections):
            self.dealer.close(last_words=closing)
            self.dealer = None
        if probe.connected:
            if self.dealer is None:
                self._connections = probe.connections
                self.dealer = Dealer(self._world, self._router, Face.CLIENTS, self._receive, lambda: self.frozen)
            for message in said:
                self.dealer.send(message)
        wake_at = None if closing else probe.session.wake_at()
        if wake_at is not None and (self._waking_at is None or wake_at < self._waking_at):
            self._waking_at = wake_at
            self._world.after(wake_at - self._world.now, self._wake)
