"""Every error a person can meet, as one tree.

    HeadraceError
    ├── ConfigError                 a setting is wrong; nothing was started
    │   ├── AddressError            an address is in use, or refused for safety
    │   └── ModelError
    │       ├── ModelNotFoundError      no source has the model
    │       ├── ModelFilesError         its files are missing, damaged or inconsistent
    │       └── UnsupportedModelError   we have no policy for its architecture
    ├── RequestError                this request cannot be served as it is
    │   ├── InvalidRequestError         a value is out of range; `param` names it
    │   ├── ContextLengthError          prompt + max_tokens do not fit the model
    │   ├── UnknownModelError           the broker serves no model of that name
    │   ├── ConflictError               the id is taken by a different request
    │   └── UnknownRequestError         nobody knows the id (it may be submitted again)
    ├── ServiceError                the service failed the request
    │   ├── OverloadedError             the queue is full; try again after `retry_after`
    │   ├── UnavailableError            no worker group is ready for the model
    │   ├── WorkerCrashedError          the request took its workers down; do not repeat it
    │   ├── SlowConsumerError           the reader stopped reading
    │   ├── ModelChangedError           a half-done stream cannot go on: the weights changed
    │   └── InternalError               a bug of ours
    ├── DeadlineExceededError       the time the caller allowed is over
    ├── RequestCancelledError       somebody cancelled the request
    ├── BrokerConnectionError       no broker answers
    │   └── RequestTimeoutError         it answered, then fell silent
    └── ProtocolError               a peer broke the wire contract
        └── UnsupportedVersionError     it speaks another version

Each class has a `code` that crosses the wire and says whether repeating may help (`retryable`). `to_wire` and
`from_wire` carry an error through a msgpack map without loss of type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

__all__ = [
    "AddressError",
    "BrokerConnectionError",
    "ConfigError",
    "ConflictError",
    "ContextLengthError",
    "DeadlineExceededError",
    "HeadraceError",
    "InternalError",
    "InvalidRequestError",
    "ModelChangedError",
    "ModelError",
    "ModelFilesError",
    "ModelNotFoundError",
    "OverloadedError",
    "ProtocolError",
    "RequestCancelledError",
    "RequestError",
    "RequestTimeoutError",
    "ServiceError",
    "SlowConsumerError",
    "UnavailableError",
    "UnknownModelError",
    "UnknownRequestError",
    "UnsupportedModelError",
    "UnsupportedVersionError",
    "WorkerCrashedError",
    "from_wire",
]


class HeadraceError(Exception):
    """Root of all errors raised on purpose.

    Attributes:
        message: what happened, why, and what to do next.
        code: stable identifier, the same on the wire and over HTTP.
        retryable: whether the same call may succeed later.
        param: the field at fault, if one is.
        retry_after: seconds to wait before trying again, if known.
        request_id: hexadecimal id of the request, if there is one.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.request_id = request_id

    def to_wire(self) -> dict[str, object]:
        """The error as a map of plain values; fields that are None are left out."""
        fields: dict[str, object] = {"code": self.code, "message": self.message}
        for name in ("param", "retry_after", "request_id"):
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        return fields


class ConfigError(HeadraceError):
    """A setting is wrong; nothing was started."""

    code = "bad_config"


class AddressError(ConfigError):
    """An address is in use, not usable, or refused because it would expose the service."""

    code = "bad_address"


class ModelError(ConfigError):
    """A model cannot be loaded."""

    code = "model_error"


class ModelNotFoundError(ModelError):
    """No source has the model."""

    code = "model_files_not_found"


class ModelFilesError(ModelError):
    """The model's files are missing, damaged or contradict each other."""

    code = "model_files_damaged"


class UnsupportedModelError(ModelError):
    """No policy covers the model's architecture."""

    code = "unsupported_model"


class RequestError(HeadraceError):
    """This request cannot be served as it is."""

    code = "bad_request"


class InvalidRequestError(RequestError):
    """A value is missing or out of range; `param` names the field."""

    code = "invalid_request"


class ContextLengthError(RequestError):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """The broker serves no model of that name."""

    code = "model_not_found"


class ConflictError(RequestError):
    """The request id is taken by a different request."""

    code = "conflict"


class UnknownRequestError(RequestError):
    """Nobody knows the request id; the request may be submitted again."""

    code = "unknown_request"


class ServiceError(HeadraceError):
    """The service failed the request."""

    code = "service_error"


class OverloadedError(ServiceError):
    """The queue is full; try again after `retry_after` seconds."""

    code = "overloaded"
    retryable = True


class UnavailableError(ServiceError):
    """No worker group is ready for the model."""

    code = "unavailable"
    retryable = True


class WorkerCrashedError(ServiceError):
    """The request took its worker group down; repeating it would do so again."""

    code = "worker_crashed"


class SlowConsumerError(ServiceError):
    """The reader of a stream stopped reading, so the stream was ended."""

    code = "slow_consumer"


class ModelChangedError(ServiceError):
    """A half-done stream cannot go on because the model was replaced meanwhile."""

    code = "model_changed"


class InternalError(ServiceError):
    """A bug of ours; the logs of the process that raised it hold the traceback."""

    code = "internal_error"


class DeadlineExceededError(HeadraceError):
    """The time that the caller allowed is over."""

    code = "deadline_exceeded"


class RequestCancelledError(HeadraceError):
    """Somebody cancelled the request."""

    code = "cancelled"


class BrokerConnectionError(HeadraceError):
    """No broker answers at the endpoint."""

    code = "no_broker"
    retryable = True


class RequestTimeoutError(BrokerConnectionError):
    """The broker answered once, then nothing came in the time allowed."""

    code = "timeout"


class ProtocolError(HeadraceError):
    """A peer broke the wire contract."""

    code = "protocol_error"


class UnsupportedVersionError(ProtocolError):
    """A peer speaks another version of the wire contract."""

    code = "unsupported_version"


def _subclasses(cls: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _subclasses(child))]


_BY_CODE = {cls.code: cls for cls in _subclasses(HeadraceError)}


def from_wire(fields: Mapping[str, object]) -> HeadraceError:
    """Rebuild the error that `HeadraceError.to_wire` wrote; a code of a newer version becomes a `ServiceError`."""
    cls = _BY_CODE.get(str(fields.get("code")), ServiceError)
    param, request_id, retry_after = fields.get("param"), fields.get("request_id"), fields.get("retry_after")
    return cls(
        str(fields.get("message", "the peer gave no reason")),
        param=None if param is None else str(param),
        retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
        request_id=None if request_id is None else str(request_id),
    )
