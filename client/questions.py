"""The session's questions to the broker: who waits for which answer. The same question is asked once at a time."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.client.events import Answer
from headrace.client.outbox import Outbox
from headrace.messages import GetBlob, Message

__all__ = ["Questions"]


class Questions:
    """Open questions, by ticket."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._open: dict[int, tuple[Message, float]] = {}  # and when they were asked

    def __bool__(self) -> bool:
        return bool(self._open)

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._open))

    def add(self, ticket: int, question: Message, now: float) -> bool:
        """One more; whether nobody waits for the same answer yet."""
        new = all(question != other for other, _ in self._open.values())
        self._open[ticket] = question, now
        return new

    def remove(self, ticket: int) -> None:
        """Nobody waits for it."""
        self._open.pop(ticket, None)

    def answer(self, question: Message, value: object) -> None:
        """Tell everyone who asked."""
        for ticket in [ticket for ticket, (asked, _) in self._open.items() if asked == question]:
            del self._open[ticket]
            self._outbox.tell(ticket, Answer(value), last=True)

    def ask_all(self) -> None:
        """Ask everything again: the connection is a new one."""
        for question in dict.fromkeys(question for question, _ in self._open.values()):
            self._outbox.send(question)

    def asked_at(self, ticket: int) -> float:
        """When the question came."""
        return self._open[ticket][1]

    def refused(self, param: str | None) -> list[int]:
        """The tickets that an error answers: it names no question, so those about blobs are known by its field."""
        blobs = [ticket for ticket, (question, _) in self._open.items() if isinstance(question, GetBlob)]
        return blobs if param in ("hash", "offset") else list(self._open)
