"""OpenAI's response bodies, built from the client library's deltas and choices as plain dicts.

They are not pydantic models: one is built per token, and there is nothing to check in what we made ourselves.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from headrace.card import ModelCard

if TYPE_CHECKING:
    from headrace.client import Choice, Delta, TokenLogprob, Usage

__all__ = ["ChatShape", "CompletionShape", "Head", "Shape", "fingerprint", "model_object", "usage_object"]

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's floor


def fingerprint(card: ModelCard) -> str:
    """What `system_fingerprint` shows: it changes with the weights, the tokenizer or the engine's settings."""
    return f"fp_{card.fingerprint[:12]}"


def model_object(card: ModelCard) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "headrace",
        "root": card.name,
        "max_model_len": card.max_model_len,
        "architecture": card.architecture,
        "dtype": card.dtype,
        **({"quantization": card.quantization} if card.quantization else {}),
        "num_parameters": card.num_parameters,
        "sampling_defaults": dict(card.sampling_defaults),
        "tasks": list(card.tasks),
    }


def usage_object(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def total_usage(usages: Iterable[Usage]) -> dict[str, Any]:
    """The counts of several prompts together."""
    all_of = list(usages)
    return usage_object(
        sum(u.prompt_tokens for u in all_of),
        sum(u.completion_tokens for u in all_of),
        sum(u.cached_tokens for u in all_of),
    )


@dataclass(frozen=True)
class Head:
    """What all chunks of one answer share."""

    prefix: str
    card: ModelCard
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.prefix}-{secrets.token_hex(16)}")

    def body(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A body or chunk of type `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.card.name,
            "system_fingerprint": fingerprint(self.card),
            "choices": choices,
            **more,
        }


class Shape(Protocol):
    """How one endpoint writes its choices."""

    prefix: str
    object: str
    chunk_object: str

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices sent before anything else of a stream."""

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Choices for one delta: none if there is nothing to tell yet, two if it is the last."""

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished choice."""


class ChatShape:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *, logprobs: bool, token_ids: bool) -> None:
        self._logprobs = logprobs
        self._token_ids = token_ids

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role."""
        return [self._choice(index, {"role": "assistant", "content": ""}, None)]

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """A content delta, then an empty one with the reason of the end."""
        pieces = []
        if delta.text or ((self._logprobs or self._token_ids) and delta.token_ids):
            choice = self._choice(index, {"content": delta.text}, None)
            if self._logprobs:
                choice["logprobs"] = _chat_logprobs(delta.logprobs)
            if self._token_ids:
                choice["token_ids"] = list(delta.token_ids)
            pieces.append(choice)
        if delta.finish_reason:
            pieces.append(self._choice(index, {}, delta.finish_reason))
        return pieces

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A message."""
        body = {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _chat_logprobs(choice.logprobs) if self._logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if self._token_ids:
            body["token_ids"] = list(choice.token_ids)
        return body

    @staticmethod
    def _choice(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
    return {
        "content": [
            {**_chat_token(entry), "top_logprobs": [_chat_token(top) for top in entry.top]} for entry in logprobs or ()
        ],
        "refusal": None,
    }


def _chat_token(entry: Any) -> dict[str, Any]:
    return {"token": entry.token, "logprob": max(entry.logprob, MIN_LOGPROB), "bytes": list(entry.bytes)}


class CompletionShape:
    """`/v1/completions`; `echoes` holds the text to repeat before each prompt's answers."""

    prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *, logprobs: bool, token_ids: bool, n: int, echoes: Sequence[str] = ()) -> None:
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._n = n
        self._echoes = echoes
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The prompt, if it is to be repeated."""
        echo = self._echo(index)
        return [self._choice(index, echo, None)] if echo else []

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The new text, with the reason if it is the end."""
        told = delta.text or delta.finish_reason or ((self._logprobs or self._token_ids) and delta.token_ids)
        if not told:
            return []
        choice = self._choice(index, delta.text, delta.finish_reason)
        if self._logprobs and delta.token_ids:
            choice["logprobs"] = self._parallel(index, delta.logprobs or ())
        if self._token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return [choice]

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished text."""
        body = self._choice(index, self._echo(index) + choice.text, choice.finish_reason)
        if self._logprobs:
            body["logprobs"] = self._parallel(index, choice.logprobs or ())
        if self._token_ids:
            body["token_ids"] = list(choice.token_ids)
        return body

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n] if self._echoes else ""

    @staticmethod
    def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _parallel(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The old form: parallel lists, and where in the text each token begins."""
        offset = self._offsets.get(index, len(self._echo(index)))
        offsets = []
        for entry in logprobs:
            offsets.append(offset)
            offset += len(entry.token)
        self._offsets[index] = offset
        return {
            "tokens": [entry.token for entry in logprobs],
            "token_logprobs": [max(entry.logprob, MIN_LOGPROB) for entry in logprobs],
            "top_logprobs": [{top.token: max(top.logprob, MIN_LOGPROB) for top in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }
