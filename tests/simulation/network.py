"""Sockets without a network, with the habits of ZeroMQ that matter here.

A `Dealer` is one socket object of a client or a leader; while it is open it has, loses and gets again a `Link` to the
broker, each time under a new identity. What was said while there was no link goes out on the next one. A link that is
lost loses what was on its way, in both directions and without a word. The broker's sends fail at once when a link is
gone, or when its pipe is full because the other side does not read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from headrace.broker.events import Face
from headrace.codec import decode, encode
from headrace.messages import BROKER_TO_CLIENT, BROKER_TO_LEADER, CLIENT_TO_BROKER, LEADER_TO_BROKER, Message
from tests.simulation.world import World

__all__ = ["Dealer", "Link", "Router"]

_RECONNECT = 0.1
_UP = {Face.CLIENTS: CLIENT_TO_BROKER, Face.WORKERS: LEADER_TO_BROKER}
_DOWN = {Face.CLIENTS: BROKER_TO_CLIENT, Face.WORKERS: BROKER_TO_LEADER}


class Router(Protocol):
    """The broker's end of all links."""

    frozen: bool

    def accept(self, link: Link) -> bool:
        """A link wants to be; False while there is no broker."""
        ...

    def receive(self, link: Link, message: Message) -> None:
        """A message arrived."""
        ...


class _Pipe:
    """One direction: in order, each message after a delay, none while somebody holds it up."""

    def __init__(
        self,
        world: World,
        held: Callable[[], bool],
        shaky: Callable[[], bool],
        deliver: Callable[[Message], None],
    ) -> None:
        self._world = world
        self._held = held
        self._shaky = shaky
        self._deliver = deliver
        self._queue: deque[tuple[float, Message]] = deque()
        self._ready = 0.0
        self.slowness = world.random.choice([0.0005, 0.002, 0.05])

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, message: Message) -> None:
        copies = self._world.random.choice([0, 1, 1, 1, 2]) if self._shaky() else 1
        if copies != 1:
            self._world.note(f"{'repeated' if copies else 'lost'} a {type(message).__name__}")
        for _ in range(copies):
            self._enter(message)

    def _enter(self, message: Message) -> None:
        self._ready = max(self._ready, self._world.now + self._world.between(0.0, self.slowness))
        self._queue.append((self._ready, message))
        self._world.after(self._ready - self._world.now, self._pump)

    def _pump(self) -> None:
        if self._queue and self._held():
            self._world.after(0.05, self._pump)
            return
        while self._queue and self._queue[0][0] <= self._world.now:
            self._deliver(self._queue.popleft()[1])

    def lose(self) -> None:
        """What is on its way never arrives."""
        self._queue.clear()


class Link:
    """One connection between a dealer and the broker.

    Attributes:
        up: whether messages can still arrive.
        known: whether the broker's end of it still stands: it may take a while to notice that the other is gone.
        partitioned_until: nothing arrives before.
        shaky_until: before that, messages get lost or repeated, as ZeroMQ never does; sessions do not rely on it.
    """

    def __init__(self, world: World, dealer: Dealer, router: Router, identity: bytes, capacity: int) -> None:
        self.identity = identity
        self.face = dealer.face
        self.up = self.known = True
        self.partitioned_until = 0.0
        self.shaky_until = 0.0
        self._world = world
        self._dealer = dealer
        self._router = router
        self._capacity = capacity
        self._to_broker = _Pipe(world, lambda: self._cut or router.frozen, self._shaky, self._at_broker)
        self._to_dealer = _Pipe(world, lambda: self._cut or dealer.frozen(), self._shaky, self._at_dealer)

    @property
    def _cut(self) -> bool:
        return self._world.now < self.partitioned_until

    def _shaky(self) -> bool:
        return self._world.now < self.shaky_until

    @property
    def full(self) -> bool:
        """Whether the broker must wait with more."""
        return len(self._to_dealer) >= self._capacity

    def say(self, message: Message) -> None:
        """From the dealer to the broker."""
        self._to_broker.push(_as_sent(message, _UP[self.face]))

    def tell(self, message: Message) -> None:
        """From the broker to the dealer."""
        self._to_dealer.push(_as_sent(message, _DOWN[self.face]))

    def drop(self) -> None:
        """The other end is gone."""
        if self.up:
            self._dealer.lose()

    def break_off(self, *, last_words: bool = False) -> None:
        """Lose the link; last words of a socket that was closed may still arrive."""
        self.up = False
        self._to_dealer.lose()
        if not last_words:
            self._to_broker.lose()

        def forget() -> None:
            self.known = False

        self._world.after(self._world.between(0.0, 1.0), forget)

    def _at_broker(self, message: Message) -> None:
        if self.known:
            self._router.receive(self, message)

    def _at_dealer(self, message: Message) -> None:
        if self.up:
            self._dealer.receive(message)


def _as_sent(message: Message, allowed: tuple[type, ...]) -> Message:
    """The message as the other side will read it: what does not survive the wire must not survive here."""
    received: Message = decode(encode(message), allowed)
    return received


class Dealer:
    """A client's or leader's socket, open until it is closed."""

    def __init__(
        self,
        world: World,
        router: Router,
        face: Face,
        receive: Callable[[Message], None],
        frozen: Callable[[], bool],
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.face = face
        self.frozen = frozen
        self._lost = lost  # called when a link breaks, as a socket's monitor does
        self.link: Link | None = None
        self._world = world
        self._router = router
        self._receive = receive
        self._waiting: list[Message] = []
        self._open = True
        self._connect()

    def send(self, message: Message) -> None:
        """Say something, now or when there is a link."""
        if self.link is not None:
            self.link.say(message)
        else:
            self._waiting.append(message)

    def receive(self, message: Message) -> None:
        """A message arrived."""
        if self._open:
            self._receive(message)

    def close(self, *, last_words: bool = False) -> None:
        """Be gone."""
        self._open = False
        if self.link is not None:
            self.link.break_off(last_words=last_words)
            self.link = None

    def lose(self) -> None:
        """The link breaks; there will be another."""
        if self.link is not None:
            self.link.break_off()
            self.link = None
            self._world.after(self._world.between(0.0, 0.3), self._connect)
            self._lost()

    def partition(self, seconds: float) -> None:
        """Nothing arrives for that long, in neither direction."""
        if self.link is not None:
            self.link.partitioned_until = self._world.now + seconds

    def shake(self, seconds: float) -> None:
        """Some of what is said in that time never arrives, or twice."""
        if self.link is not None:
            self.link.shaky_until = self._world.now + seconds

    def _connect(self) -> None:
        if not self._open or self.link is not None:
            return
        capacity = self._world.random.choice([4, 16, 64])
        link = Link(self._world, self, self._router, self._world.random.randbytes(5), capacity)
        if self.frozen() or not self._router.accept(link):
            self._world.after(_RECONNECT, self._connect)
            return
        self.link = link
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            link.say(message)
