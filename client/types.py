"""The values a caller of the client library sees: plain, frozen, comparable; no behaviour beyond a shortcut or two."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from headrace.errors import HeadraceError, InvalidRequestError

__all__ = [
    "Choice",
    "Completion",
    "Delta",
    "Embeddings",
    "MapItem",
    "MaskFill",
    "Timeouts",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How many seconds to wait for what; None waits for ever.

    Attributes:
        connect: for a broker to answer at all.
        first_token: from the call to the first token, time in the queue included.
        between_tokens: from one token to the next.
        total: for the whole answer, unless a call's own `timeout` says else.
    """

    connect: float = 5.0
    first_token: float | None = 120.0
    between_tokens: float | None = 30.0
    total: float | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None and name != "connect":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise InvalidRequestError(f"{name} is {value!r}; give seconds above 0.", param=name)


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    token: str
    token_id: int
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log probability; `bytes` are exact where `token` shows half a character as U+FFFD."""

    token: str
    token_id: int
    bytes: bytes
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What a stream brings: the tokens that came and the text that is certain so far.

    Text may lag behind its tokens: half a character, or what may become a stop string, is held back. The last delta
    of a choice has a `finish_reason`: stop, length or cancelled.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished continuation."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted: of the prompt, of all choices together, and those of the prompt found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    id: str
    model: str
    prompt_tokens: int
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class MapItem:
    """One result of `map`: the completion, or the error that this prompt alone met."""

    index: int
    prompt: Any
    completion: Completion | None = None
    error: HeadraceError | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Embeddings(Sequence["array[float]"]):
    """Vectors of texts, in order: a sequence of arrays of float32 numbers, which numpy takes as they are.

    Attributes:
        model: that made them.
        vectors: one for each text.
        prompt_tokens: of all texts together.
    """

    model: str
    vectors: tuple[array[float], ...]
    prompt_tokens: int

    def __repr__(self) -> str:
        size = len(self.vectors[0]) if self.vectors else 0
        return f"<Embeddings of {self.model}: {len(self.vectors)} vectors of {size}>"

    def __len__(self) -> int:
        return len(self.vectors)

    @overload
    def __getitem__(self, index: int) -> array[float]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[array[float]]: ...
    def __getitem__(self, index: int | slice) -> array[float] | Sequence[array[float]]:
        return self.vectors[index]


@dataclass(frozen=True, slots=True)
class MaskFill:
    """A word for a mask.

    Attributes:
        token: its text.
        token_id: its id.
        probability: of it at this place.
        text: all of the text with it; other masks are left out.
    """

    token: str
    token_id: int
    probability: float
    text: str
