"""The served models, by name: asked of the broker, remembered for a moment so that not every request asks again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace.card import ModelCard
from headrace.errors import InvalidRequestError, UnavailableError, UnknownModelError

if TYPE_CHECKING:
    from headrace.client import AsyncClient

__all__ = ["Catalog"]


class Catalog:
    """Cards of the models that have a ready group; at most `max_age` seconds old."""

    def __init__(
        self, client: AsyncClient, *, max_age: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._max_age = max_age
        self._clock = clock
        self._cards: dict[str, ModelCard] = {}
        self._asked = -float("inf")

    async def cards(self, *, fresh: bool = False) -> list[ModelCard]:
        """All of them; `fresh` asks the broker in any case."""
        if fresh or not self._cards or self._clock() - self._asked > self._max_age:
            self._cards = {card.name: card for card in await self._client.models()}
            self._asked = self._clock()
        return list(self._cards.values())

    async def find(self, name: str) -> ModelCard:
        """The card of a model; an empty name means the only one.

        Raises:
            UnknownModelError: no such model is served.
            InvalidRequestError: no name was given, and there are several models.
            UnavailableError: no model is ready at all.
        """
        cards = await self.cards()
        if name not in self._cards and (name or not cards):
            cards = await self.cards(fresh=True)
        if not cards:
            raise UnavailableError(
                "No model is ready yet: no worker group has reported to the broker. Start one with "
                "`headrace workers`, or wait until it has loaded.",
                param="model",
                retry_after=2.0,
            )
        if name in self._cards:
            return self._cards[name]
        served = ", ".join(sorted(self._cards))
        if not name and len(cards) == 1:
            return cards[0]
        if not name:
            raise InvalidRequestError(f"model is missing; name one of those served: {served}.", param="model")
        raise UnknownModelError(f"The model {name[:200]!r} is not served here; there is {served}.", param="model")
