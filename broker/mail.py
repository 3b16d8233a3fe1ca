"""Gathers the actions of one event, and keeps messages for peers whose pipes are full. Knows nothing of requests."""

from __future__ import annotations

from typing import Any

from headrace.broker.events import Action, Face, Note, Send
from headrace.messages import Blob, Message

__all__ = ["MAX_BACKLOG", "Mailer"]

MAX_BACKLOG = 1 << 14  # messages kept for one blocked peer; one that lets more pile up has stopped reading
_BLOB_WEIGHT = 512  # a part of a blob counts as so many messages
_RETRY = 256  # messages tried again per peer and tick


class _Backlog:
    """What one blocked peer is to be sent: first what came back just now, then what gathered behind it."""

    __slots__ = ("behind", "returned", "weight")

    def __init__(self) -> None:
        self.returned: list[Message] = []
        self.behind: list[Message] = []
        self.weight = 0

    def add(self, message: Message, to: list[Message]) -> None:
        to.append(message)
        self.weight += _BLOB_WEIGHT if type(message) is Blob else 1

    def take(self, count: int) -> list[Message]:
        """The first messages; the others stay."""
        waiting = self.returned + self.behind
        self.returned, self.behind, self.weight = [], [], 0
        for message in waiting[count:]:
            self.add(message, self.behind)
        return waiting[:count]


class Mailer:
    """The way out of the core."""

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._blocked: dict[tuple[Face, bytes], _Backlog] = {}

    def send(self, face: Face, peer: bytes, message: Message) -> None:
        """Send, or keep behind what already waits for this peer."""
        if self._blocked and (backlog := self._blocked.get((face, peer))) is not None:
            backlog.add(message, backlog.behind)
        else:
            self._actions.append(Send(face, peer, message))

    def note(self, level: int, text: str, **fields: Any) -> None:
        """Log a line."""
        self._actions.append(Note(level, text, fields))

    def take(self) -> list[Action]:
        """All actions since the last call."""
        actions, self._actions = self._actions, []
        return actions

    def block(self, face: Face, peer: bytes, message: Message | None) -> None:
        """The peer's pipe is full; keep the message that came back, if given."""
        backlog = self._blocked.setdefault((face, peer), _Backlog())
        if message is not None:
            backlog.add(message, backlog.returned)

    def is_blocked(self, face: Face, peer: bytes) -> bool:
        """Whether messages to the peer wait for a retry."""
        return bool(self._blocked) and (face, peer) in self._blocked

    def overflowing(self) -> list[tuple[Face, bytes]]:
        """Blocked peers for whom more waits than they are worth."""
        return [key for key, backlog in self._blocked.items() if backlog.weight > MAX_BACKLOG]

    def drop(self, face: Face, peer: bytes) -> None:
        """Forget what waits for a peer that is gone."""
        self._blocked.pop((face, peer), None)

    def retry(self) -> None:
        """Try blocked peers again, a part of what waits at a time."""
        for (face, peer), backlog in list(self._blocked.items()):
            self._actions.extend(Send(face, peer, message) for message in backlog.take(_RETRY))
            if not backlog.weight:
                del self._blocked[face, peer]
