"""Makes a request out of a caller's arguments: what is wrong with them is said before anything is sent."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import length_hint
from typing import TYPE_CHECKING, Any

from headrace.card import ModelCard
from headrace.client.events import Spec
from headrace.client.text import Text
from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.messages import pack_tokens
from headrace.sampling import SamplingParams
from headrace.tasks import GENERATE

if TYPE_CHECKING:
    from headrace.client.assemble import Assembler

__all__ = ["Prepared", "Wish", "check_timeout", "checked_ids", "prepare"]

_SETTINGS = tuple(f.name for f in fields(SamplingParams))
_OTHERS = ("messages", "token_ids", "model", "sampling", "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a caller asked for, as far as it can be checked without a model.

    Exactly one of prompt, messages and token_ids is given.
    """

    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    token_ids: Sequence[int] | None = None
    model: str = ""
    sampling: SamplingParams | None = None
    timeout: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self.settings)
        given = [name for name in ("prompt", "messages", "token_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise TypeError(f"give exactly one of prompt, messages and token_ids, not {' and '.join(given) or 'none'}")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise TypeError(f"prompt must be a string, not {type(self.prompt).__name__}; token ids go into token_ids")
        if self.sampling is not None and not isinstance(self.sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, not {type(self.sampling).__name__}")
        check_timeout(self.timeout)

    def prepare(self, text: Text, total: float | None) -> Prepared:
        """The request that this makes of a model, see `prepare`."""
        return prepare(self, text, total)

    @property
    def size(self) -> int:
        """Characters to tokenize or ids to check, roughly: much of it is better done off an event loop."""
        if self.prompt is not None:
            return len(self.prompt)
        if self.messages is not None:
            return len(str(self.messages))
        return length_hint(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A request with all that is needed to read its answer."""

    spec: Spec
    prompt: Sequence[int]
    sampling: SamplingParams
    card: ModelCard
    text: Text

    def collector(self) -> Assembler:
        """What puts the answer together."""
        from headrace.client.assemble import Assembler

        return Assembler(self)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse names that are no settings.

    Raises:
        TypeError: one is not; names the nearest.
    """
    for name in settings:
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, (*_SETTINGS, *_OTHERS), n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown setting {name!r}; did you mean {near!r}?")


def check_timeout(timeout: float | None) -> None:
    """Refuse what is no span of time.

    Raises:
        InvalidRequestError: it is not a number above 0.
    """
    good = isinstance(timeout, int | float) and not isinstance(timeout, bool) and math.isfinite(timeout)
    if timeout is not None and not (good and timeout > 0):
        raise InvalidRequestError(
            f"timeout is {timeout!r}; give seconds above 0, or None for no limit.", param="timeout"
        )


def prepare(wish: Wish, text: Text, total: float | None) -> Prepared:
    """Settings in force and prompt in tokens; `total` is the client's own limit of time.

    Raises:
        RequestError: a value is out of range, or the prompt does not fit the model.
    """
    card = text.card
    if GENERATE not in card.tasks:
        raise InvalidRequestError(
            f"{card.name} is an encoder and generates no text: it can {' and '.join(card.tasks).replace('_', ' ')}. "
            "Name another model.",
            param="model",
        )
    sampling = _sampling(wish, card)
    prompt = _prompt(wish, text)
    if not prompt:
        raise InvalidRequestError("The prompt is empty; give at least one token.", param=_named(wish))
    if len(prompt) >= card.max_model_len:
        raise ContextLengthError(
            f"The prompt has {len(prompt):,} tokens; {card.name} takes {card.max_model_len:,}, the answer included. "
            "Shorten it.",
            param=_named(wish),
        )
    spec = Spec(
        model=card.name,
        prompt=pack_tokens(prompt),
        sampling=sampling.to_wire(),
        choices=sampling.n,
        fingerprint=card.fingerprint,
        timeout=total if wish.timeout is None else wish.timeout,
    )
    return Prepared(spec=spec, prompt=prompt, sampling=sampling, card=card, text=text)


def _named(wish: Wish) -> str:
    return next(name for name in ("prompt", "messages", "token_ids") if getattr(wish, name) is not None)


def _sampling(wish: Wish, card: ModelCard) -> SamplingParams:
    """The caller's word first, then the model's own settings; a whole SamplingParams leaves the model's out."""
    if wish.sampling is not None:
        return wish.sampling.replace(**wish.settings) if wish.settings else wish.sampling
    defaults = {name: value for name, value in card.sampling_defaults.items() if name in _SETTINGS}
    return SamplingParams(**{**defaults, **wish.settings})


def _prompt(wish: Wish, text: Text) -> Sequence[int]:
    if wish.prompt is not None:
        return text.encode(wish.prompt)
    if wish.messages is not None:
        return text.encode_chat(wish.messages)
    assert wish.token_ids is not None
    return checked_ids(wish.token_ids, text.card.vocab_size)


def checked_ids(ids: object, vocab_size: int) -> list[int]:
    """Token ids as whole numbers.

    Raises:
        InvalidRequestError: they are none, or one is beyond the vocabulary.
    """
    if not isinstance(ids, Iterable):
        raise InvalidRequestError(
            f"token_ids is {type(ids).__name__}; give a list of whole numbers.", param="token_ids"
        )
    # Nearly always they are a list of plain numbers, which takes a look at the whole instead of at each.
    if type(ids) is list and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return ids.copy()
    checked: list[int] = []
    for number, token in enumerate(ids):
        # Whatever counts as a whole number may come, from numpy or torch too; floats and strings may not.
        try:
            value = token.__index__()
        except AttributeError:
            value = -1
        if isinstance(token, bool) or not 0 <= value < vocab_size:
            raise InvalidRequestError(
                f"token_ids[{number}] is {token!r:.40}; this model's ids go from 0 to {vocab_size - 1}.",
                param="token_ids",
            )
        checked.append(value)
    return checked
