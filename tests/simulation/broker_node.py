"""The broker in the simulation: the real pure core, and a shell that does to it what the real one does."""

from __future__ import annotations

from random import Random

from headrace.broker.config import BrokerConfig
from headrace.broker.core import Broker
from headrace.broker.events import Event, Face, Note, PeerLost, Received, SendBlocked, Stop, Tick, TurnEnd
from headrace.messages import Message
from tests.simulation.network import Link
from tests.simulation.world import World

__all__ = ["BrokerNode"]

_TICK = 0.1


class BrokerNode:
    """A broker that can be killed, started again with nothing in its head, frozen and thawed."""

    def __init__(self, world: World, config: BrokerConfig) -> None:
        self.frozen = False
        self.core: Broker | None = None
        self._world = world
        self._config = config
        self._links: dict[tuple[Face, bytes], Link] = {}
        self._run = 0
        self._turn_due = False
        self.start()

    def start(self) -> None:
        """A new run of it."""
        if self.core is None:
            self._run += 1
            self.core = Broker(self._config, name=f"run {self._run}", rng=Random(self._world.random.random()))
            self._turn_due = False
            self._tick(self._run)

    def kill(self) -> None:
        """It is gone, with all it knew; its links break."""
        self.core = None
        self.frozen = False
        links, self._links = self._links, {}
        for link in links.values():
            link.drop()

    def stop(self) -> None:
        """It says so, and is gone."""
        self._feed(Stop())
        self._world.after(0.1, self.kill)

    def freeze(self) -> None:
        """It stands still, as after SIGSTOP."""
        self.frozen = self.core is not None

    def thaw(self) -> None:
        """It goes on."""
        self.frozen = False

    # --------------------------------------------------------------------------------------------- as a router

    def accept(self, link: Link) -> bool:
        """A link wants to be."""
        if self.core is None:
            return False
        self._links[link.face, link.identity] = link
        return True

    def receive(self, link: Link, message: Message) -> None:
        """A message arrived."""
        if self.core is not None and self._links.get((link.face, link.identity)) is link:
            self._feed(Received(link.face, link.identity, message))
            if not self._turn_due:
                self._turn_due = True
                self._world.after(self._world.between(0.0, 0.002), self._end_turn)

    # ------------------------------------------------------------------------------------------------- its shell

    def _end_turn(self) -> None:
        if self.frozen:
            self._world.after(0.05, self._end_turn)
            return
        self._turn_due = False
        self._feed(TurnEnd())

    def _tick(self, run: int) -> None:
        if self.core is None or run != self._run:
            return
        if not self.frozen:
            self._feed(Tick())
            self._feed(TurnEnd())
        self._world.after(_TICK, lambda: self._tick(run))

    def _feed(self, event: Event) -> None:
        if (core := self.core) is None:
            return
        actions = core.handle(event, self._world.now)
        core.validate()
        blocked: set[tuple[Face, bytes]] = set()
        for action in actions:
            if isinstance(action, Note):
                self._world.note(f"{action.text} {action.fields.get('reason', '')}".strip())
            elif (trouble := self._send(action.face, action.peer, action.message, blocked)) is not None:
                self._feed(trouble)

    def _send(self, face: Face, peer: bytes, message: Message, blocked: set[tuple[Face, bytes]]) -> Event | None:
        link = self._links.get((face, peer))
        if link is None or not link.known:
            self._links.pop((face, peer), None)
            return PeerLost(face, peer)
        if (face, peer) in blocked or link.full:
            blocked.add((face, peer))
            self._world.note("send blocked")
            return SendBlocked(face, peer, message)
        link.tell(message)
        return None
