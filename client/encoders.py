"""Requests to models that read a text and do not continue it: its vector, or words for its masks. Runs nothing.

A wish is checked before anything is sent, becomes a `ReadText` when the model's tokenizer is at hand, and its answer is
put together by a collector, as the answers of generating models are (`headrace.client.assemble`).
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

from headrace.card import ModelCard
from headrace.client.events import Ended, Failed, News, NewTokens, Spec
from headrace.client.map import Outcome
from headrace.client.prepare import check_timeout, checked_ids
from headrace.client.text import Text
from headrace.client.types import Embeddings, MaskFill
from headrace.errors import ContextLengthError, HeadraceError, InvalidRequestError
from headrace.messages import pack_tokens
from headrace.sampling import MAX_LOGPROBS
from headrace.tasks import EMBED, FILL_MASK, PoolingParams

__all__ = ["AT_ONCE", "EmbedWish", "MaskWish", "ReadText", "Vector", "embed_wishes", "joined", "result_of", "until"]

AT_ONCE = 256  # texts of one call that are under way together


@dataclass(frozen=True, slots=True)
class Vector:
    """The vector of one text, and what it cost."""

    values: array[float]
    prompt_tokens: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedWish:
    """A text or its tokens, whose vector is wanted.

    Attributes:
        source: text, or token ids.
        model: name of the model; empty for the only one.
        settings: fields of PoolingParams; those not given are the model's own.
        truncate: read only as much of a long text as the model takes.
        until: on the monotonic clock, when it must be there.
    """

    source: str | Sequence[int]
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    truncate: bool = False
    until: float | None = None

    def __post_init__(self) -> None:
        PoolingParams(**self.settings)
        if not isinstance(self.source, str) and (isinstance(self.source, bytes) or not _is_sequence(self.source)):
            raise InvalidRequestError(
                f"A text is {type(self.source).__name__}; give a string or a list of token ids.", param="texts"
            )

    @property
    def size(self) -> int:
        """Characters to tokenize or ids to check."""
        return length_hint(self.source)

    def prepare(self, text: Text, total: float | None) -> ReadText:
        """The request; `total` is the client's own limit of time.

        Raises:
            RequestError: a value is out of range, or the text does not fit the model.
        """
        card = text.card
        _check_task(card, EMBED)
        limit = card.max_model_len if self.truncate else None
        if isinstance(self.source, str):
            prompt: Sequence[int] = text.encode(self.source, limit=limit)
        else:
            prompt = checked_ids(self.source, card.vocab_size)[:limit]
        pooling = PoolingParams(**{**card.pooling_defaults, **self.settings})
        spec = _spec(prompt, card, EMBED, self.until, total, pooling=pooling.to_wire())
        return ReadText(spec, len(prompt), lambda news: Vector(_floats(news), len(prompt), card.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskWish:
    """A text with mask tokens, for which the likeliest words are wanted.

    Attributes:
        source: the text.
        model: name of the model; empty for the only one.
        top_k: how many words for each.
        until: on the monotonic clock, when it must be there.
    """

    source: str
    model: str = ""
    top_k: int = 5
    until: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise InvalidRequestError(f"text is {type(self.source).__name__}; give a string.", param="text")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or not 1 <= self.top_k <= MAX_LOGPROBS:
            raise InvalidRequestError(
                f"top_k is {self.top_k!r}; give a whole number from 1 to {MAX_LOGPROBS}.", param="top_k"
            )

    @property
    def size(self) -> int:
        """Characters to tokenize."""
        return len(self.source)

    def prepare(self, text: Text, total: float | None) -> ReadText:
        """The request; `total` is the client's own limit of time.

        Raises:
            RequestError: the model fills no masks, or the text does not fit it or has none.
        """
        card = text.card
        _check_task(card, FILL_MASK)
        prompt = text.encode(self.source)
        masks = [place for place, token in enumerate(prompt) if token == card.mask_token_id]
        if not masks:
            shown = card.special_tokens.get("mask_token") or text.token(card.mask_token_id or 0)[0]
            raise InvalidRequestError(
                f"The text has no {shown}, so there is nothing to fill; put one where a word is missing.", param="text"
            )
        spec = _spec(prompt, card, FILL_MASK, self.until, total, sampling={"logprobs": self.top_k})
        return ReadText(spec, len(prompt), lambda news: _fills(text, prompt, masks, news))


class ReadText:
    """A request ready for the wire, and the collector of its answer.

    Attributes:
        spec: of the request.
        prompt_tokens: of the text.
    """

    def __init__(self, spec: Spec, prompt_tokens: int, result: Callable[[list[NewTokens]], Any]) -> None:
        self.spec = spec
        self.prompt_tokens = prompt_tokens
        self._result = result

    def collector(self) -> ItemCollector:
        """What puts the answer together."""
        return ItemCollector(self._result)


class ItemCollector:
    """Items of one request, until all are there.

    Attributes:
        error: the error that ended it, if one did.
        done: whether nothing more will come.
    """

    def __init__(self, result: Callable[[list[NewTokens]], Any]) -> None:
        self.error: HeadraceError | None = None
        self.done = False
        self._make = result
        self._news: list[NewTokens] = []

    def feed(self, news: News) -> None:
        """Take what came."""
        match news:
            case NewTokens():
                self._news.append(news)
            case Ended():
                self.done = True
            case Failed():
                self.error = news.error
                self.done = True

    def completion(self) -> Any:
        """The answer.

        Raises:
            HeadraceError: the request failed.
        """
        if self.error is not None:
            raise self.error
        return self._make(self._news)


def until(timeout: float | None) -> float | None:
    """When a call that may take so many seconds must be done.

    Raises:
        InvalidRequestError: it is no span of time.
    """
    check_timeout(timeout)
    return None if timeout is None else time.monotonic() + timeout


def embed_wishes(texts: object, **options: Any) -> list[EmbedWish]:
    """One wish for each text.

    Raises:
        InvalidRequestError: they are no texts, or an option is out of range.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise InvalidRequestError(
            f"texts is {type(texts).__name__}; give a string, or a list of strings or of lists of token ids.",
            param="texts",
        )
    settings = {
        name: value for name in ("pooling", "normalize", "dimensions") if (value := options.pop(name)) is not None
    }
    return [EmbedWish(source=text, settings=settings, **options) for text in texts]


def result_of(outcome: Outcome, count: int) -> Any:
    """The result of one of `count` texts.

    Raises:
        HeadraceError: it failed; says which of them.
    """
    error = outcome.error
    if error is None:
        return outcome.result
    if count == 1:
        raise error
    raise type(error)(
        f"texts[{outcome.index}]: {error.message}",
        param=error.param,
        retry_after=error.retry_after,
        request_id=error.request_id,
    ) from error


def joined(vectors: Sequence[Vector], model: str) -> Embeddings:
    """All vectors as one answer."""
    return Embeddings(
        vectors[0].model if vectors else model,
        tuple(vector.values for vector in vectors),
        sum(vector.prompt_tokens for vector in vectors),
    )


def _is_sequence(value: object) -> bool:
    return isinstance(value, Iterable) and hasattr(value, "__len__")


def _check_task(card: ModelCard, task: str) -> None:
    if task not in card.tasks:
        raise InvalidRequestError(
            f"{card.name} cannot {task.replace('_', ' ')}: it can {' and '.join(card.tasks).replace('_', ' ')}. Name "
            "another model.",
            param="model",
        )


def _spec(
    prompt: Sequence[int], card: ModelCard, task: str, deadline: float | None, total: float | None, **settings: Any
) -> Spec:
    if not prompt:
        raise InvalidRequestError("The text is empty; give at least one token.", param="texts")
    if len(prompt) > card.max_model_len:
        raise ContextLengthError(
            f"The text has {len(prompt):,} tokens, but {card.name} takes {card.max_model_len:,}. Shorten it, or set "
            "truncate.",
            param="texts",
        )
    return Spec(
        model=card.name,
        prompt=pack_tokens(prompt),
        fingerprint=card.fingerprint,
        timeout=total if deadline is None else max(0.001, deadline - time.monotonic()),
        task=task,
        **settings,
    )


def _floats(news: Iterable[NewTokens]) -> array[float]:
    values = array("f")
    for part in news:
        values.frombytes(part.tokens.tobytes())
    return values


def _fills(text: Text, prompt: list[int], masks: Sequence[int], news: Iterable[NewTokens]) -> tuple[Any, ...]:
    """The likeliest words for each mask, in the order of the text."""
    likeliest = [top for part in news for _, top in part.logprobs or ()]
    return tuple(
        tuple(_fill(text, prompt, place, int(token), float(logprob)) for token, logprob in top)
        for place, top in zip(masks, likeliest, strict=True)
    )


def _fill(text: Text, prompt: list[int], place: int, token: int, logprob: float) -> MaskFill:
    filled = [*prompt[:place], token, *prompt[place + 1 :]]
    return MaskFill(text.decode([token]).strip(), token, math.exp(logprob), text.decode(filled))
