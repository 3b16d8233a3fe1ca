"""What happens to the leader's core and what it wants done: its whole vocabulary. No behaviour.

    in   Received Refusals Stepped LinkLost Blocked Flowing Drain Tick Beat
    out  Connect Disconnect Send Call Tell Note End

The shell feeds what it received and a Tick, then carries the calls out, steps, and feeds what came of it. A message
that cannot be sent at once waits in the shell, which says Blocked, and Flowing once all that waited is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from headrace.errors import HeadraceError
from headrace.messages import Message, Refusal
from headrace.workers import plan

__all__ = [
    "Action",
    "Beat",
    "Blocked",
    "Call",
    "Connect",
    "Disconnect",
    "Drain",
    "End",
    "Event",
    "Flowing",
    "LinkLost",
    "Note",
    "Received",
    "Refusals",
    "Send",
    "Stepped",
    "Tell",
    "Tick",
]


class Received(NamedTuple):
    """A well-formed message of the broker."""

    message: Message


class Refusals(NamedTuple):
    """Streams that the engine would not take on."""

    refusals: list[Refusal]


class Stepped(NamedTuple):
    """The engine computed; `step` is its counter now."""

    results: plan.Results
    step: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The connection to the broker broke."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """The broker takes no messages at present."""


@dataclass(frozen=True, slots=True)
class Flowing:
    """It takes them again."""


class Drain(NamedTuple):
    """The launcher wants the group to finish within `grace` seconds and end."""

    grace: float


class Tick(NamedTuple):
    """Time passed; `load` are the engine's gauges, if a heartbeat is due."""

    load: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """Time passed during a step: nothing but a heartbeat may follow."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a new socket."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the socket, and forget what was not sent."""


class Send(NamedTuple):
    """Send a message to the broker."""

    message: Message


class Call(NamedTuple):
    """A call for the engine of every rank, in this order, before the next step."""

    call: plan.Call


class Tell(NamedTuple):
    """Tell the launcher something."""

    kind: str
    fields: dict[str, Any]


class Note(NamedTuple):
    """Write a log line."""

    level: int
    text: str


class End(NamedTuple):
    """The leader is done: well, or because of an error."""

    error: HeadraceError | None


Event = Received | Refusals | Stepped | LinkLost | Blocked | Flowing | Drain | Tick | Beat
Action = Connect | Disconnect | Send | Call | Tell | Note | End
