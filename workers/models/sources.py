"""What a source of models is, and how several are tried: in order, each failure kept with its reason."""

from __future__ import annotations

import http.client
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from headrace.errors import HeadraceError, ModelFilesError, ModelNotFoundError, UnsupportedModelError
from headrace.workers.models.progress import Progress

__all__ = ["Failure", "Fetched", "Source", "no_source", "reason", "try_sources"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A model that a source delivered.

    Attributes:
        folder: with its files and nothing else.
        facts: what to note: source, revision, licence.
        digests: sha256 by file name.
    """

    folder: Path
    facts: Mapping[str, Any]
    digests: Mapping[str, str]


class Source(Protocol):
    """Somewhere that has a model.

    Attributes:
        name: for people.
    """

    name: str

    def fetch(self, work: Path, progress: Progress) -> Fetched:
        """Get the model into a folder in `work`, going on from what is there.

        Raises:
            HeadraceError, OSError: it cannot; the next source is tried.
        """


@dataclass(slots=True)
class Failure:
    """What was tried in vain: (source, why)."""

    reasons: list[tuple[str, Exception]] = field(default_factory=list)

    def add(self, name: str, error: Exception) -> None:
        """Remember one more."""
        self.reasons.append((name, error))

    def __str__(self) -> str:
        return "\n".join(f"  - {name}: {reason(error)}" for name, error in self.reasons)


def try_sources(sources: Sequence[Source], work: Path, progress: Progress, failure: Failure) -> Fetched | None:
    """What the first source that works delivers; None if none does, with the reasons in `failure`."""
    for number, source in enumerate(sources):
        try:
            return source.fetch(work, progress)
        except (HeadraceError, OSError, http.client.HTTPException) as error:
            failure.add(source.name, error)
            if number + 1 < len(sources):
                progress(f"{source.name}: {reason(error)}; trying {sources[number + 1].name}", 0, None)
    return None


def reason(error: Exception) -> str:
    """Why, in one line without a full stop."""
    text = str(error) or type(error).__name__
    if isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError | http.client.HTTPException):
        text = f"cannot be reached: {getattr(error, 'reason', None) or text}"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'disk'}: {error.strerror or text}"
    return " ".join(text.split()).rstrip(".")


def no_source(model: object, failure: Failure, *, wheels: bool) -> HeadraceError:
    """The error when all failed."""
    _, last = failure.reasons[-1]
    if isinstance(last, ModelFilesError | UnsupportedModelError) and not wheels:
        return last  # the only place that has the model answered, and what it has cannot be served: that is the message
    mirrors = "HF_ENDPOINT or pip's index-url" if wheels else "HF_ENDPOINT"
    return ModelNotFoundError(
        f"No source has the model {model}:\n{failure}\n"
        f"Check the network (behind a proxy set HTTPS_PROXY; for a mirror {mirrors}) and run this again: it goes on "
        "from what was downloaded. Or give a folder or a .gguf file that is on this machine.",
        param="model",
    )
