"""Probes: does the process live (`/health`), can it answer (`/ready`), does a model make tokens or vectors
(`/health/decode`).

They need no key, so they reveal no more than names and cost next to nothing however often they are called.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from headrace._version import __version__
from headrace.errors import HeadraceError, RequestTimeoutError, UnavailableError
from headrace.gateway.errors import JSONAnswer, as_headrace_error, error_body
from headrace.gateway.state import Gateway, gateway_of
from headrace.tasks import GENERATE

__all__ = ["LastProbe", "router"]

router = APIRouter(tags=["Health"])

_PROBE_TIMEOUT = 3.0  # a probe that hangs tells its caller nothing
_DECODE_TIMEOUT = 10.0
_DECODE_FRESH = 15.0
_NO_MODEL = "No worker group is ready yet; models may still be loading."


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Response:
    """The process lives."""
    return JSONAnswer({"status": "ok", "version": __version__})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> Response:
    """At least one model can answer; 503 with the reason otherwise."""
    gateway = gateway_of(request)
    if gateway.draining:
        return _not_ready("draining", "The gateway is shutting down; send requests elsewhere.")
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT):
            cards = await gateway.client.models()
    except TimeoutError:
        return _not_ready("no_broker", f"The broker did not answer within {_PROBE_TIMEOUT:g} seconds; is it running?")
    except HeadraceError as error:
        return _not_ready(error.code, error.message)
    if not cards:
        return _not_ready("no_model", _NO_MODEL)
    return JSONAnswer({"status": "ready", "models": [card.name for card in cards]})


def _not_ready(reason: str, message: str) -> Response:
    error = {"message": message, "type": "server_error", "param": None, "code": reason}
    body = {"status": "not ready", "reason": reason, "error": error}
    return JSONAnswer(body, status_code=503, headers={"retry-after": "2"})


@dataclass
class LastProbe:
    """The latest answer of `/health/decode`: one probe at a time, and its result serves everyone for a while."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    at: float = -float("inf")
    error: HeadraceError | None = None


@router.head("/health/decode", include_in_schema=False)
@router.get("/health/decode")
async def decode(request: Request) -> Response:
    """A model makes a token, or a vector; asked of each at most every few seconds."""
    gateway = gateway_of(request)
    probe: LastProbe = request.app.state.decode_probe
    async with probe.lock:
        if time.monotonic() - probe.at > _DECODE_FRESH:
            probe.error = await _probe(gateway)
            probe.at = time.monotonic()
    age = round(time.monotonic() - probe.at, 1)
    if probe.error is not None:
        return JSONAnswer({"status": "failed", "age_seconds": age} | error_body(probe.error), status_code=503)
    return JSONAnswer({"status": "ok", "age_seconds": age})


async def _probe(gateway: Gateway) -> HeadraceError | None:
    settings: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    try:
        async with asyncio.timeout(_DECODE_TIMEOUT):
            cards = await gateway.client.models()
            for card in cards:
                if GENERATE in card.tasks:
                    await gateway.client.generate("a", model=card.name, **settings)
                else:
                    await gateway.client.embed("a", model=card.name)
    except TimeoutError:
        return RequestTimeoutError(f"No token came within {_DECODE_TIMEOUT:g} seconds.")
    except Exception as error:
        return as_headrace_error(error)
    return None if cards else UnavailableError(_NO_MODEL)
