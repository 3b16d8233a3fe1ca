"""The broker's core between pure clients and pure groups, on a virtual clock: everything around it, and no socket.

Each token is `f(seed, choice, index)`, so a repeat, a gap or a wrong resume is a wrong token. `World` validates the
broker after every event and sends every message through the codec.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from headrace.broker.config import BrokerConfig
from headrace.broker.core import Broker
from headrace.broker.events import Face, Note, PeerLost, Received, Send, SendBlocked, Tick, TurnEnd
from headrace.codec import decode, encode
from headrace.messages import (
    BROKER_TO_CLIENT,
    BROKER_TO_LEADER,
    CLIENT_TO_BROKER,
    LEADER_TO_BROKER,
    Done,
    Finish,
    Ping,
    Request,
    TokenRun,
    Tokens,
)
from tests.broker.answers import card, emit, request, text
from tests.broker.pure_client import PureClient, Record
from tests.broker.pure_group import PureGroup

__all__ = ["PureClient", "PureGroup", "Record", "World", "card", "emit", "finals", "request", "runs", "text"]

_IN = {Face.CLIENTS: CLIENT_TO_BROKER, Face.WORKERS: LEADER_TO_BROKER}
_OUT = {Face.CLIENTS: BROKER_TO_CLIENT, Face.WORKERS: BROKER_TO_LEADER}


class World:
    """One broker and everybody around it."""

    def __init__(self, *, seed: int = 0, **config: Any) -> None:
        self.config = BrokerConfig(**config)
        self.rng = random.Random(seed)
        self.now = 100.0
        self.clients: dict[bytes, PureClient] = {}
        self.groups: list[PureGroup] = []
        self.blocked: set[bytes] = set()
        self.notes: list[Note] = []
        self._peers = 0
        self._runs = 0
        self.restart_broker()

    # ---------------------------------------------------------------------------------------------- the broker

    def restart_broker(self) -> None:
        """SIGKILL of the broker, and a new one in its place."""
        self._runs += 1
        self.broker = Broker(self.config, name=f"run-{self._runs}", rng=self.rng)

    def receive(self, face: Face, peer: bytes, message: Any) -> None:
        """A message arrives at the broker, as the codec leaves it."""
        self.feed(Received(face, peer, decode(encode(message), _IN[face])))

    def feed(self, event: Any) -> None:
        """One event and all that follows."""
        actions = self.broker.handle(event, self.now)
        self.broker.validate()
        blocked: set[bytes] = set()
        for action in actions:
            if isinstance(action, Note):
                self.notes.append(action)
            else:
                self._deliver(action, blocked)

    def _deliver(self, action: Send, blocked: set[bytes]) -> None:
        face, peer, message = action
        reader = self._reader(face, peer)
        if reader is None:
            self.feed(PeerLost(face, peer))
        elif peer in blocked or peer in self.blocked:
            blocked.add(peer)
            self.feed(SendBlocked(face, peer, message))
        else:
            reader.inbox.append(decode(encode(message), _OUT[face]))

    def _reader(self, face: Face, peer: bytes) -> PureClient | PureGroup | None:
        if face is Face.CLIENTS:
            return self.clients.get(peer)
        return next((group for group in self.groups if group.alive and group.peer == peer), None)

    # ----------------------------------------------------------------------------------------- time and turns

    def new_peer(self, name: str) -> bytes:
        """An identity that no connection had before."""
        self._peers += 1
        return f"{name}#{self._peers}".encode()

    def settle(self) -> None:
        """Let everybody read until nobody has anything to say."""
        for _ in range(1000):
            self.feed(TurnEnd())
            busy = [r for r in (*self.clients.values(), *self.groups) if r.inbox]
            for reader in busy:
                reader.read()
            if not any(reader.inbox for reader in busy if not getattr(reader, "frozen", False)):
                self.feed(TurnEnd())
                if not any(r.inbox for r in (*self.clients.values(), *self.groups) if not getattr(r, "frozen", False)):
                    return
        raise AssertionError("they never fall silent")

    def tick(self, seconds: float = 0.1) -> None:
        """Time passes and everybody who lives shows it."""
        self.now += seconds
        for group in self.groups:
            group.beat()
        for client in list(self.clients.values()):
            if not client.silent:
                client.send(Ping())
        self.feed(Tick())
        self.settle()

    def wait(self, seconds: float) -> None:
        """Time passes in ticks, as in a broker that was not stopped meanwhile."""
        until = self.now + seconds
        while self.now < until - 1e-6:
            self.tick(min(0.5, until - self.now))

    def step(self, times: int = 1) -> None:
        """Every group makes a step, everybody reads."""
        for _ in range(times):
            for group in self.groups:
                group.step()
            self.settle()

    def group(self, name: str = "g0", **settings: Any) -> PureGroup:
        """A group that joined."""
        group = PureGroup(self, name, **settings).start()
        self.settle()
        return group

    def client(self, name: str = "c") -> PureClient:
        """A client that was welcomed."""
        client = PureClient(self, name).hello()
        self.settle()
        return client

    def run(self, client: PureClient, *requests: Request, steps: int = 2000) -> list[Record]:
        """Submit, and step until all have ended."""
        records = client.submit(*requests)
        self.finish(records, steps=steps)
        return records

    def finish(self, records: Sequence[Record], *, steps: int = 2000) -> None:
        """Step, tick and bring dead groups back until all have ended."""
        for count in range(steps):
            self.settle()
            if all(record.ended for record in records):
                return
            self.step()
            self.tick(0.1)
            if count % 10 == 0:
                for group in self.groups:
                    if not group.alive:
                        group.start()
        raise AssertionError(f"unfinished: {[vars(r) for r in records if not r.ended]}")


def runs(client: PureClient) -> list[TokenRun]:
    """All runs of tokens that a client was sent."""
    return [run for message in client.said if isinstance(message, Tokens) for run in message.runs]


def finals(client: PureClient) -> list[Finish]:
    """All good ends that a client was sent."""
    return [finish for message in client.said if isinstance(message, Done) for finish in message.finishes]
