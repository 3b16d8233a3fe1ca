"""How the next token is chosen: `SamplingParams`, checked once at the edge and trusted afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from headrace.errors import InvalidRequestError

__all__ = ["MAX_LOGIT_BIAS", "MAX_LOGPROBS", "MAX_N", "MAX_STOP", "MAX_STOP_LENGTH", "SamplingParams"]

MAX_N = 16
MAX_STOP = 16
MAX_STOP_LENGTH = 1024  # characters of one stop string
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**64 - 1
MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling settings of one request.

    Attributes:
        max_tokens: most tokens to generate; None means as many as the context holds.
        min_tokens: end-of-text and stop ids are held back until this many were generated.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set whose probabilities reach this sum; 1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest; 0 keeps all.
        repetition_penalty: divides (or multiplies, if negative) logits of tokens in the prompt or output (CTRL).
        presence_penalty: subtracted once from logits of tokens already generated (OpenAI).
        frequency_penalty: subtracted once per occurrence in the output (OpenAI).
        seed: key of the counter RNG; None lets the broker draw one.
        n: independent continuations of the same prompt.
        stop: strings that end the text. They need text, so the client library cuts at them, not the engine.
        stop_token_ids: token ids that end a continuation, besides the model's own.
        ignore_eos: go on past the model's end-of-text tokens.
        logprobs: with each token return its log probability and this many of the likeliest; None for none.
        logit_bias: token id -> value added to its logit.

    Raises:
        InvalidRequestError: a value is out of range; `param` names the field.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_int("n", self.n, 1, MAX_N)
        if type(self.ignore_eos) is not bool:
            raise _bad("ignore_eos", self.ignore_eos, "true or false")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_logit_bias()

    def _check_stops(self) -> None:
        given: object = self.stop  # people write one string or a list
        stop = _as_tuple("stop", (given,) if isinstance(given, str) else given, "a list of strings")
        if len(stop) > MAX_STOP:
            raise _bad("stop", f"{len(stop)} strings", f"at most {MAX_STOP} strings")
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise _bad("stop", text, f"strings of 1 to {MAX_STOP_LENGTH} characters")
        object.__setattr__(self, "stop", stop)
        ids = _as_tuple("stop_token_ids", self.stop_token_ids, "a list of token ids")
        if len(ids) > MAX_STOP_IDS:
            raise _bad("stop_token_ids", ids, f"at most {MAX_STOP_IDS} token ids")
        for token in ids:
            _check_int("stop_token_ids", token, 0, MAX_TOKEN_ID)
        object.__setattr__(self, "stop_token_ids", ids)

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _bad("logit_bias", self.logit_bias, f"a map of at most {MAX_LOGIT_BIAS} token ids")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, MAX_TOKEN_ID)
            _check_float("logit_bias", bias, -100.0, 100.0)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0

    def replace(self, **changes: object) -> SamplingParams:
        """A checked copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_wire(self) -> dict[str, object]:
        """What the engine needs, as a msgpack map: fields that differ from the default, without `stop`."""
        wire = {name: value for name, default in _defaults().items() if (value := getattr(self, name)) != default}
        if "logit_bias" in wire:
            wire["logit_bias"] = [[token, bias] for token, bias in self.logit_bias.items()]
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, object]) -> SamplingParams:
        """The inverse of `to_wire`; fields of a newer version are ignored, bad values raise InvalidRequestError."""
        known = _defaults()
        values = {name: value for name, value in wire.items() if name in known}
        try:
            if "logit_bias" in values:
                values["logit_bias"] = {pair[0]: pair[1] for pair in values["logit_bias"]}  # type: ignore[attr-defined]
            if "stop_token_ids" in values:
                values["stop_token_ids"] = tuple(values["stop_token_ids"])  # type: ignore[arg-type]
            return cls(**values)  # type: ignore[arg-type]
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise InvalidRequestError(
                f"The sampling settings have the wrong shape: {error}.", param="sampling"
            ) from error


@cache
def _defaults() -> Mapping[str, object]:
    """What travels, and the values of which nothing need be said: looked up with every request, so kept."""
    default = SamplingParams()
    return {f.name: getattr(default, f.name) for f in fields(default) if f.name != "stop"}


def _bad(name: str, value: object, wanted: str) -> InvalidRequestError:
    shown = repr(value)
    return InvalidRequestError(f"{name} is {shown[:80]}; give {wanted}.", param=name)


def _as_tuple(name: str, value: object, wanted: str) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise _bad(name, value, wanted)
    return tuple(value)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(name, value, f"a whole number from {low} to {high}")


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not low <= number <= high or (open_low and number == low):  # also false for what is not a number
        bounds = f"above {low} up to {high}" if open_low else f"from {low} to {high}"
        raise _bad(name, value, f"a number {bounds}")
