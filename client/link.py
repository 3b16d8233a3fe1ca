"""The session's connection: when to open one, greet, ping, give it up, and come back. It knows nothing of requests.

    state     event                        next
    idle      work                         greeting     Connect, Hello
    greeting  Welcome                      ready        the session says what it has to say
    greeting  1 s without a word           greeting     Hello again: a dying broker may have taken the first one along
    greeting  4 s without a word           backoff      Disconnect
    ready     4 s silent, or "not known"   backoff      Disconnect
    backoff   time is up                   greeting     Connect, Hello
    greeting, backoff   no work is left    idle         Disconnect
    any       close                        closed       Disconnect

An idle or ready connection without work is not pinged, so its silence counts only from when work comes.
"""

from __future__ import annotations

from enum import Enum
from random import Random

from headrace.client.events import Connect, Disconnect
from headrace.client.outbox import Outbox
from headrace.errors import HeadraceError
from headrace.messages import Hello, Ping

__all__ = ["PING_EVERY", "SILENCE", "Connection", "Link"]

PING_EVERY = 1.0
SILENCE = 4.0  # a broker that says nothing for this long, though asked, is gone
_BACKOFF = (0.1, 5.0)
_FAULTS = 3  # protocol errors in a row, with nothing good between, after which trying again is no use


class Link(Enum):
    """What there is between this client and the broker."""

    IDLE = "idle"
    GREETING = "greeting"
    READY = "ready"
    BACKOFF = "backoff"
    CLOSED = "closed"


class Connection:
    """One client's connection, or its absence.

    Attributes:
        state: what there is.
        down_since: since when there has been no broker; has a meaning while there is none.
        refusal: what the broker said instead of Welcome, if it said anything.
    """

    def __init__(self, outbox: Outbox, random: Random, name: str) -> None:
        self._outbox = outbox
        self._random = random
        self._name = name
        self.state = Link.IDLE
        self.down_since = 0.0
        self.refusal: HeadraceError | None = None
        self._turn_at = 0.0  # greeting: when to give it up; backoff: when it is over
        self._heard_at = 0.0
        self._spoke_at = 0.0  # the last Hello or Ping
        self._nonce = 0
        self._tries = 0
        self._faults = 0

    @property
    def ready(self) -> bool:
        """Whether the broker may be told things."""
        return self.state is Link.READY

    def work_begins(self, now: float) -> None:
        """There was nothing to do, and now there is."""
        # What is asked of a ready connection now tries it as a ping would.
        self._heard_at = self._spoke_at = now
        if self.state is Link.IDLE:
            self.down_since = now
            self.refusal = None
            self._tries = 0
            self._connect(now)

    def rest(self) -> None:
        """There is no work: an unanswered greeting is not worth waiting for."""
        if self.state in (Link.GREETING, Link.BACKOFF):
            self.drop(Link.IDLE)

    def welcomed(self, now: float) -> None:
        """The broker answered the greeting."""
        self.state = Link.READY
        self._tries = 0
        self._spoke_at = now
        self.refusal = None

    def heard(self, now: float) -> None:
        """The broker said something."""
        self._heard_at = now

    def went_well(self) -> None:
        """It said something that shows that it understands us."""
        self._faults = 0

    def misunderstood(self, now: float) -> bool:
        """It did not understand us: try anew; False if that is of no use any more."""
        self._faults += 1
        if self._faults > _FAULTS:
            self._faults = 0
            return False
        self.lost(now, now)
        return True

    def refused(self, error: HeadraceError, now: float) -> None:
        """It takes no more clients, or none any more."""
        self.refusal = error
        self.lost(now, now)

    def lost(self, now: float, since: float) -> None:
        """Drop it and wait, longer each time and by a random part, so that a crowd does not come back at once."""
        if self.state is Link.READY:
            self.down_since = since
        low, high = _BACKOFF
        wait = min(high, low * 2.0 ** min(self._tries, 10)) * self._random.uniform(0.5, 1.0)
        self.drop(Link.BACKOFF)
        self._turn_at = now + max(low, wait)

    def drop(self, state: Link) -> None:
        """Have none from now on."""
        self.state = state
        self._outbox.act(Disconnect())

    def tick(self, now: float) -> None:
        """Time passed, and there is work."""
        silent = now - self._spoke_at >= PING_EVERY
        match self.state:
            case Link.BACKOFF if now >= self._turn_at:
                self._connect(now)
            case Link.GREETING if now >= self._turn_at:
                self.lost(now, now)
            case Link.GREETING if silent:
                self._greet(now)
            case Link.READY if now - self._heard_at >= SILENCE:
                self.lost(now, self._heard_at)
            case Link.READY if silent:
                self._spoke_at = now
                self._nonce += 1
                self._outbox.send(Ping(nonce=self._nonce))

    def _connect(self, now: float) -> None:
        self.state = Link.GREETING
        self._turn_at = now + SILENCE
        self._tries += 1
        self._outbox.act(Connect())
        self._greet(now)

    def _greet(self, now: float) -> None:
        self._spoke_at = now
        self._outbox.send(Hello(name=self._name))
