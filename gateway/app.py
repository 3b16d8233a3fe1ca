"""The gateway as one ASGI application: routes, errors and limits put together around a client of the broker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from headrace._version import __version__
from headrace.errors import HeadraceError
from headrace.gateway import chat, completions, embeddings, errors, generate, health, page
from headrace.gateway.limits import Limits
from headrace.gateway.settings import GatewaySettings
from headrace.gateway.state import Gateway, gateway_of

if TYPE_CHECKING:
    from headrace.client import AsyncClient

__all__ = ["create_app"]

_SCRAPE_TIMEOUT = 2.0


def create_app(client: AsyncClient, settings: GatewaySettings | None = None) -> FastAPI:
    """The application; it uses `client`, but whoever made the client closes it."""
    settings = settings or GatewaySettings()
    # The documentation pages of FastAPI load scripts from elsewhere; the schema itself stays.
    app = FastAPI(title="Headrace", version=__version__, docs_url=None, redoc_url=None)
    app.state.gateway = gateway = Gateway(client, settings)
    app.state.decode_probe = health.LastProbe()
    errors.install(app)
    for part in (chat, completions, embeddings, generate, health, page):
        app.include_router(part.router)
    app.add_api_route("/metrics", metrics, methods=["GET"], tags=["Health"])
    app.add_api_route("/metrics", metrics, methods=["HEAD"], include_in_schema=False)
    app.add_middleware(Limits, gateway=gateway)
    if settings.allowed_origins:
        # Around the limits: a browser asks without a key first, and shows an error only if it is allowed to read it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id", "x-should-retry"],
        )
    return app


async def metrics(request: Request) -> Response:
    """Metrics for Prometheus; without the broker's part if it does not answer in time."""
    gateway = gateway_of(request)
    report = None
    try:
        async with asyncio.timeout(_SCRAPE_TIMEOUT):
            report = await gateway.client.status()
    except (TimeoutError, HeadraceError):
        pass  # headrace_broker_up says so
    return Response(gateway.metrics.render(report), headers={"content-type": CONTENT_TYPE_LATEST})
