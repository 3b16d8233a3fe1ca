"""Errors as OpenAI's clients expect them: one JSON body for every status, and headers that say whether to retry.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

A `HeadraceError` says all of it itself; this module only chooses the status. Tracebacks and paths never leave.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from headrace.errors import (
    BrokerConnectionError,
    ConfigError,
    ConflictError,
    DeadlineExceededError,
    HeadraceError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
    UnknownModelError,
    UnknownRequestError,
)

__all__ = ["ApiError", "as_headrace_error", "error_body", "error_response", "install", "json_bytes", "status_of"]

log = logging.getLogger("headrace.gateway")

# The first class that fits decides, so special cases stand before their parents.
_STATUS: tuple[tuple[type[HeadraceError], int], ...] = (
    (UnknownModelError, 404),
    (UnknownRequestError, 404),
    (ConflictError, 409),
    (RequestError, 400),
    (OverloadedError, 429),
    (UnavailableError, 503),
    (DeadlineExceededError, 504),
    (RequestCancelledError, 499),
    (RequestTimeoutError, 504),
    (BrokerConnectionError, 503),
    (ConfigError, 500),
)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
}


class ApiError(RequestError):
    """A request that HTTP itself refuses: no key, too large, wrong method. `status` is the answer's."""

    def __init__(self, status: int, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.status = status


class JSONAnswer(Response):
    """A JSON response that no text can break."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json_bytes(content)


def json_bytes(content: Any) -> bytes:
    """Compact UTF-8 JSON; half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def status_of(error: HeadraceError) -> int:
    """The HTTP status that tells an error best."""
    if isinstance(error, ApiError):
        return error.status
    return next((status for cls, status in _STATUS if isinstance(error, cls)), 500)


def error_body(error: HeadraceError) -> dict[str, Any]:
    """The body of an error, also sent inside a stream that has already begun."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = _CODES.get(status, "error") if isinstance(error, ApiError) else error.code
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def error_response(error: HeadraceError, headers: Mapping[str, str] | None = None) -> Response:
    """The response for an error; `x-should-retry` and `retry-after` steer the retries of OpenAI's SDKs."""
    extra = dict(headers or {})
    extra["x-should-retry"] = "true" if error.retryable else "false"
    if error.retryable:
        extra["retry-after"] = str(max(1, math.ceil(error.retry_after or 1.0)))
    status = status_of(error)
    if status == 401:
        extra["www-authenticate"] = "Bearer"
    return JSONAnswer(error_body(error), status_code=status, headers=extra)


def as_headrace_error(error: BaseException) -> HeadraceError:
    """The error itself, or an `InternalError` for one that nobody foresaw (logged here, with its traceback)."""
    if isinstance(error, HeadraceError):
        return error
    log.error("unexpected error", exc_info=error)
    return InternalError("The gateway met an error it did not expect; its log has the details under this request's id.")


def install(app: FastAPI) -> None:
    """Make the app answer every error in this form."""
    app.add_exception_handler(HeadraceError, _on_headrace_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_headrace_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    messages = {
        404: f"There is nothing at {path}; the API is below /v1, the chat page at /.",
        405: f"{request.method} is not allowed at {path}"
        + (f"; use {error.headers['Allow']}." if error.headers and "Allow" in error.headers else "."),
        400: "The body is not JSON that can be read.",
    }
    message = messages.get(error.status_code) or HTTPStatus(error.status_code).phrase
    return error_response(ApiError(error.status_code, message), error.headers)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_explain(error.errors()))


# Names pydantic puts into a location for the branch of a union it tried; they are no fields.
_BRANCHES = frozenset({"str", "int", "float", "bool", "none", "body", "query"})


def _explain(problems: Sequence[Any]) -> InvalidRequestError:
    """One error for a body that does not fit its model: the deepest problem is the one the sender meant."""
    problem = max(problems, key=lambda p: len(p["loc"]))
    if problem["type"] == "json_invalid":
        return InvalidRequestError(f"The body is not JSON: {problem.get('ctx', {}).get('error', 'it cannot be read')}.")
    param = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part not in _BRANCHES and "[" not in part:
            param += f".{part}" if param else part
    if not param:
        return InvalidRequestError("The body must be a JSON object.")
    if problem["type"] == "missing":
        return InvalidRequestError(f"{param} is missing; it is required.", param=param)
    wishes = {p["msg"][0].lower() + p["msg"][1:] for p in problems if p["loc"][:2] == problem["loc"][:2]}
    return InvalidRequestError(f"{param}: {' or '.join(sorted(wishes))}.", param=param)
