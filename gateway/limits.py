"""The gateway's door: what every request must pass before any route sees it, and what every response carries.

In this order: request id, headers' size, Host, Origin, key, draining, number in work, media type, body's size and pace.
All of it is decided from the ASGI scope alone (never from a URL that a header can rewrite), and what is not allowed is
refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.errors import HeadraceError, OverloadedError, UnavailableError
from headrace.gateway.errors import ApiError, as_headrace_error, error_response
from headrace.gateway.sse import ClientGoneError
from headrace.gateway.state import Gateway

__all__ = ["Limits"]

log = logging.getLogger("headrace.gateway")

# All that is open to those without a key: the probes, and the page that asks for one.
_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/health/decode"})
_OPEN_FOLDER = "/static/"

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})  # others would be labels of a sender

_SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

_UNSAFE_IN_ID = re.compile(r"[^A-Za-z0-9._:-]")
_LINGER_BYTES = 64 * 2**20
_LINGER_SECONDS = 2.0


class Limits:
    """ASGI middleware; see the module's text."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway
        self._settings = gateway.settings
        self._keys = tuple(_digest(key.encode("utf-8", "surrogateescape")) for key in gateway.settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as an ASGI application."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._serve(scope, receive, _Answer(scope, send))
        else:
            await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        started = time.monotonic()
        counted = not _is_open(scope["path"])
        self._gateway.in_work += counted
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replay(body, receive), answer)
        except ClientGoneError:
            answer.status = answer.status or 499
        except Exception as error:
            await answer.fail(as_headrace_error(error), scope, receive)
        finally:
            self._gateway.in_work -= counted
            handler = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._gateway.metrics.http.labels(method, handler, str(answer.status or 499)).inc()
            log.info("%s %s %s %s %.3fs", answer.request_id, method, handler, answer.status, time.monotonic() - started)

    # ------------------------------------------------------------------------------------------------------ checks

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._settings.max_headers:
            raise ApiError(431, f"The headers have {size} bytes; at most {self._settings.max_headers} are read.")
        self._check_host(headers)
        self._check_origin(headers)
        if _is_open(scope["path"]):
            return
        self._check_key(headers)
        if self._gateway.draining:
            raise UnavailableError("The gateway is shutting down; send the request again later.", retry_after=2.0)
        if self._gateway.in_work > self._settings.max_requests:
            raise OverloadedError(
                f"{self._settings.max_requests} requests are in work, the most this gateway takes; try again shortly.",
                retry_after=1.0,
            )

    def _check_host(self, headers: Headers) -> None:
        name = _host_name(headers.get("host", ""))
        if not name or not self._settings.host_allowed(name):
            raise ApiError(
                403,
                f"The gateway does not answer to the name {name[:200]!r}. Use localhost, or start it with "
                "--allow-host and this name.",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._settings.allowed_origins:
            return
        scheme, _, site = origin.lower().partition("://")
        if scheme not in ("http", "https") or site != headers["host"].lower():
            raise ApiError(
                403, f"Pages of {origin[:200]!r} may not call this gateway; start it with --allow-origin and that site."
            )

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip().encode("latin-1"))  # the bytes as they came
        # All keys are compared, each in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "A valid API key is needed: send it as `Authorization: Bearer KEY`.")

    # -------------------------------------------------------------------------------------------------------- body

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, None for methods that have none."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        headers = Headers(scope=scope)
        limit = self._settings.max_body
        if (length := headers.get("content-length", "0")).isdigit() and int(length) > limit:
            raise ApiError(413, f"The body has {length} bytes; at most {limit} are read.")
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            raise ApiError(415, "The body must be JSON, with `Content-Type: application/json`.")
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                return b"".join([part async for part in _parts(receive, limit)])
        except TimeoutError as error:
            raise ApiError(
                408, f"The body did not arrive within {self._settings.body_timeout:g} seconds; send it again."
            ) from error


async def _parts(receive: Receive, limit: int) -> Any:
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise ApiError(413, f"The body is larger than {limit} bytes, the most that is read.")
        more = message.get("more_body", False)
        yield part


def _replay(body: bytes | None, receive: Receive) -> Receive:
    """A `receive` that first gives the body that was read already."""
    if body is None:
        return receive
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


class _Answer:
    """`send` with the headers that every response carries; remembers the status."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self.status = 0
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = _UNSAFE_IN_ID.sub("", given)[:128] or secrets.token_hex(16)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)

    async def fail(self, error: HeadraceError, scope: Scope, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun."""
        if self.status:
            return
        response = error_response(error)
        if not isinstance(error, ApiError) or error.status not in (408, 413, 415):
            await response(scope, receive, self)
            return
        # The body is still on its way. Closing now would reset the connection, and the sender would never read why.
        response.headers["connection"] = "close"
        await self({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await self._send({"type": "http.response.body", "body": response.body, "more_body": True})
        if "expect" not in Headers(scope=scope):
            await _linger(receive)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _linger(receive: Receive) -> None:
    """Read and drop what comes, within limits."""
    size = 0
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while size < _LINGER_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_json(media_type: str) -> bool:
    kind = media_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
