"""Gathers the actions of one event, and keeps messages for peers whose pipes are full. Knows nothing of requests."""

from __future__ import annotations

from typing import Any

from headrace.broker.events import Action, Face, Note, Send
from headrace.messages import Message

__all__ = ["MAX_BACKLOG", "Mailer"]

MAX_BACKLOG = 1024  # messages kept for one blocked peer; one that lets more pile up has stopped reading


class Mailer:
    """The way out of the core."""

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._blocked: dict[tuple[Face, bytes], list[Message]] = {}

    def send(self, face: Face, peer: bytes, message: Message) -> None:
        """Send, or keep behind what already waits for this peer."""
        if self._blocked and (face, peer) in self._blocked:
            self._blocked[face, peer].append(message)
        else:
            self._actions.append(Send(face, peer, message))

    def note(self, level: int, text: str, **fields: Any) -> None:
        """Log a line."""
        self._actions.append(Note(level, text, fields))

    def take(self) -> list[Action]:
        """All actions since the last call."""
        actions, self._actions = self._actions, []
        return actions

    def block(self, face: Face, peer: bytes, message: Message | None) -> bool:
        """The peer's pipe is full; keep the message, if given. False when too many wait."""
        backlog = self._blocked.setdefault((face, peer), [])
        if message is not None:
            backlog.append(message)
        return len(backlog) <= MAX_BACKLOG

    def is_blocked(self, face: Face, peer: bytes) -> bool:
        """Whether messages to the peer wait for a retry."""
        return bool(self._blocked) and (face, peer) in self._blocked

    def drop(self, face: Face, peer: bytes) -> None:
        """Forget what waits for a peer that is gone."""
        self._blocked.pop((face, peer), None)

    def retry(self) -> list[tuple[Face, bytes]]:
        """Try all blocked peers again; returns them."""
        if not self._blocked:
            return []
        blocked, self._blocked = self._blocked, {}
        for (face, peer), backlog in blocked.items():
            self._actions.extend(Send(face, peer, message) for message in backlog)
        return list(blocked)
