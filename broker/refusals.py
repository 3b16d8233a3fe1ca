"""The broker's refusals that are said in several places: one wording each, with what to do about it."""

from __future__ import annotations

from headrace.errors import DeadlineExceededError, ModelChangedError, UnavailableError, UnsupportedVersionError
from headrace.messages import PROTOCOL_VERSION

__all__ = ["model_changed", "too_late", "unavailable", "unsupported_version"]


def too_late() -> DeadlineExceededError:
    """The deadline passed."""
    return DeadlineExceededError("The time allowed for the request is over; allow more or ask for fewer tokens.")


def unavailable(model: str = "") -> UnavailableError:
    """There is no group to run it."""
    of = f" for {model!r}" if model else ""
    return UnavailableError(f"No worker group is ready{of}; see `headrace status`, and try again.", retry_after=5.0)


def model_changed(model: str) -> ModelChangedError:
    """Only other weights are left."""
    return ModelChangedError(f"The model {model!r} was replaced while this stream was under way; start it again.")


def unsupported_version(who: str, theirs: int) -> UnsupportedVersionError:
    """The peer speaks another version."""
    return UnsupportedVersionError(
        f"This {who} speaks version {theirs} of the protocol, the broker version {PROTOCOL_VERSION}; "
        "install the same release of headrace on both sides."
    )
