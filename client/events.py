"""What the client session is told and what it wants done: its whole vocabulary, and nothing that acts.

    in    Start Drop Ask Close (the caller)   Received LinkFailed (the socket)   Tick (the clock)
    out   Connect Disconnect Send (to the socket)   Emit (to the caller): NewTokens Ended Failed Answer

A ticket is the caller's name for one request or question; it stays when a request is tried again under a new id.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace.errors import HeadraceError
from headrace.messages import Message
from headrace.tasks import GENERATE

__all__ = [
    "Action",
    "Answer",
    "Ask",
    "Close",
    "Connect",
    "Disconnect",
    "Drop",
    "Emit",
    "Ended",
    "Event",
    "Failed",
    "LinkFailed",
    "NewTokens",
    "News",
    "Received",
    "Send",
    "Spec",
    "Start",
    "Tick",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A request ready for the wire.

    Attributes:
        model: name of the model.
        prompt: packed token ids.
        sampling: wire map of the settings.
        choices: continuations wanted.
        fingerprint: of the model's card.
        timeout: seconds for all of it, or None.
        task: what is asked for.
        pooling: wire map of how a vector is made.
    """

    model: str
    prompt: bytes
    sampling: dict[str, Any] = field(default_factory=dict)
    choices: int = 1
    fingerprint: str = ""
    timeout: float | None = None
    task: str = GENERATE
    pooling: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------- in


class Start(NamedTuple):
    """Requests to run, by ticket; together they are few messages."""

    requests: tuple[tuple[int, Spec], ...]


class Drop(NamedTuple):
    """Nobody waits for this ticket any more: cancel it."""

    ticket: int


class Ask(NamedTuple):
    """A question that one message answers: Describe, GetStatus or GetBlob."""

    ticket: int
    question: Message


class Received(NamedTuple):
    """A message of the broker."""

    message: Message


class LinkFailed(NamedTuple):
    """The endpoint cannot be connected to, whatever listens there."""

    error: HeadraceError


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Close:
    """Cancel everything and be gone."""


# --------------------------------------------------------------------------------------------------------- out


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a new socket."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Drop the socket with all it may still hold."""


class Send(NamedTuple):
    """Say this to the broker."""

    message: Message


class NewTokens(NamedTuple):
    """Tokens of a choice, directly after those before; `logprobs` as in a TokenRun."""

    request: bytes
    choice: int
    tokens: array[int]
    logprobs: list[Any] | None


class Ended(NamedTuple):
    """A choice ended well."""

    request: bytes
    choice: int
    reason: str
    cached: int


class Failed(NamedTuple):
    """The whole request, or the question, ended with an error."""

    error: HeadraceError


class Answer(NamedTuple):
    """The answer to a question."""

    value: Any


News = NewTokens | Ended | Failed | Answer


class Emit(NamedTuple):
    """News for a ticket; nothing comes after the `last`."""

    ticket: int
    news: News
    last: bool


Event = Start | Drop | Ask | Close | Received | LinkFailed | Tick
Action = Connect | Disconnect | Send | Emit
