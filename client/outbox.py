"""Gathers the actions that follow from one event of the session, in order."""

from __future__ import annotations

from headrace.client.events import Action, Emit, News, Send
from headrace.messages import Message

__all__ = ["Outbox"]


class Outbox:
    """The way out of the session."""

    def __init__(self) -> None:
        self._actions: list[Action] = []

    def act(self, action: Action) -> None:
        """Do this."""
        self._actions.append(action)

    def send(self, message: Message) -> None:
        """Say this to the broker."""
        self._actions.append(Send(message))

    def tell(self, ticket: int, news: News, *, last: bool) -> None:
        """Tell this to the caller."""
        self._actions.append(Emit(ticket, news, last))

    def take(self) -> list[Action]:
        """All actions since the last call."""
        actions, self._actions = self._actions, []
        return actions
