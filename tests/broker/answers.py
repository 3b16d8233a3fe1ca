"""What the pure clients and groups of these tests agree on: the tokens of a stream, a model's card, a request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from headrace.card import ModelCard
from headrace.messages import Request, pack_tokens

EOS = 7


def emit(seed: int, choice: int, index: int) -> int:
    """The token at an index."""
    return hashlib.blake2b(f"{seed}/{choice}/{index}".encode(), digest_size=1).digest()[0]


def text(seed: int, choice: int, max_tokens: int, *, ignore_eos: bool = True) -> tuple[list[int], str]:
    """All tokens of a choice, and the reason of its end."""
    tokens: list[int] = []
    for index in range(max_tokens):
        tokens.append(emit(seed, choice, index))
        if not ignore_eos and tokens[-1] == EOS:
            return tokens, "stop"
    return tokens, "length"


def card(name: str = "m", **changes: Any) -> ModelCard:
    """A card of a model whose tokens are bytes."""
    fields: dict[str, Any] = {
        "architecture": "FakeForCausalLM",
        "family": "fake",
        "fingerprint": "f0",
        "vocab_size": 256,
        "max_model_len": 4096,
        "eos_token_ids": (EOS,),
    }
    return ModelCard(name=name, **{**fields, **changes})


def request(number: int, *, prompt: Sequence[int] = (1, 2, 3), model: str = "m", **rest: Any) -> Request:
    """A request with a readable id; sampling settings and fields of Request by name."""
    fields = {k: rest.pop(k) for k in ("budget_ms", "output", "attempt", "fingerprint", "task", "pooling") if k in rest}
    sampling = {"max_tokens": 8, "ignore_eos": True, "seed": number, **rest}
    wire = {name: value for name, value in sampling.items() if value is not None}
    return Request(id=number.to_bytes(16), model=model, prompt=pack_tokens(prompt), sampling=wire, **fields)
