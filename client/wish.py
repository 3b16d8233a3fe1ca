"""What can be asked for in a batch: a wish, the request it makes of its model, and the collector of the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from headrace.client.events import News, Spec
from headrace.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.client.text import Text

__all__ = ["AnyWish", "Collector", "Ready"]

R_co = TypeVar("R_co", covariant=True)


class Collector(Protocol):
    """Puts an answer together out of the news of its request."""

    error: HeadraceError | None

    @property
    def done(self) -> bool:
        """Whether nothing more will come that matters."""

    def feed(self, news: News) -> object:
        """Take what came."""

    def completion(self) -> Any:
        """The answer, once done; raises the error that ended it."""


class Ready(Protocol):
    """A request ready for the wire."""

    @property
    def spec(self) -> Spec:
        """The request."""

    def collector(self) -> Collector:
        """What puts its answer together."""


class AnyWish(Protocol[R_co]):
    """What a caller asked for, checked as far as it can be without a model."""

    @property
    def model(self) -> str:
        """Name of the model; empty for the only one."""

    @property
    def size(self) -> int:
        """Characters to tokenize or ids to check, roughly: much of it is better done off an event loop."""

    def prepare(self, text: Text, total: float | None) -> R_co:
        """The request; `total` is the client's own limit of time."""
