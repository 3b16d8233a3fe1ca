"""What the parts of one gateway share; FastAPI keeps it on the app, `gateway_of` finds it from a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from headrace.gateway.metrics import Metrics
from headrace.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from headrace.card import ModelCard
    from headrace.client import AsyncClient

__all__ = ["Gateway", "gateway_of"]


@dataclass
class Gateway:
    """The parts of a running gateway.

    Attributes:
        client: of the broker; it also remembers models and their tokenizers for a few seconds.
        settings: what a person set.
        metrics: what is counted.
        draining: no new work is taken, what runs is finished.
        in_work: requests being served, those to the open paths left out.
    """

    client: AsyncClient
    settings: GatewaySettings
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    in_work: int = 0

    async def card(self, name: str) -> ModelCard:
        """The card of a model; an empty name means the only one.

        Raises:
            UnknownModelError: no such model is served, or none was named and there are several.
            UnavailableError: no model is ready at all.
        """
        return (await self.client.text(name)).card


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves this request."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway
