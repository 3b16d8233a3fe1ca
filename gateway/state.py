"""What the routes of one gateway share; FastAPI keeps it on the app, `gateway_of` finds it from a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from headrace.gateway.catalog import Catalog
from headrace.gateway.metrics import Metrics
from headrace.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from headrace.client import AsyncClient

__all__ = ["Gateway", "gateway_of"]


@dataclass
class Gateway:
    """The parts of a running gateway; `draining` makes `/ready` say no before the listener closes."""

    client: AsyncClient
    settings: GatewaySettings
    catalog: Catalog = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False

    def __post_init__(self) -> None:
        self.catalog = Catalog(self.client)


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves this request."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway
