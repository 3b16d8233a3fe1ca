"""What happens to the broker's core and what it wants done: its whole vocabulary. No behaviour.

    in   Received Malformed PeerLost SendBlocked Tick TurnEnd Stop
    out  Send Note

The shell feeds everything it received, then Tick when one is due, then TurnEnd, which places streams and sends
tokens. A Send that would block comes back as SendBlocked, in order and with all later ones to that peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from headrace.messages import Message

__all__ = [
    "Action",
    "Event",
    "Face",
    "Malformed",
    "Note",
    "PeerLost",
    "Received",
    "Send",
    "SendBlocked",
    "Stop",
    "Tick",
    "TurnEnd",
]


class Face(Enum):
    """The two sides of the broker, each a socket of its own."""

    CLIENTS = "clients"
    WORKERS = "workers"


class Received(NamedTuple):
    """A well-formed message of a kind that this face takes."""

    face: Face
    peer: bytes
    message: Message


class Malformed(NamedTuple):
    """Frames that are no message."""

    face: Face
    peer: bytes
    reason: str


class PeerLost(NamedTuple):
    """Nobody has this identity any more."""

    face: Face
    peer: bytes


class SendBlocked(NamedTuple):
    """A message was not sent: the peer's pipe is full."""

    face: Face
    peer: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The sockets are drained: time to place streams and to send what gathered."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The broker is about to end."""


class Send(NamedTuple):
    """Send a message to a peer."""

    face: Face
    peer: bytes
    message: Message


class Note(NamedTuple):
    """Write a log line."""

    level: int
    text: str
    fields: dict[str, Any]


Event = Received | Malformed | PeerLost | SendBlocked | Tick | TurnEnd | Stop
Action = Send | Note
