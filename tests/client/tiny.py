"""The tiny model as a client sees it: a card, its files, and a `Text` of them."""

from __future__ import annotations

import hashlib
from typing import Any

from headrace.card import CHAT_TEMPLATE, TOKENIZER, ModelCard
from headrace.client.text import Text
from tests.support.tiny_tokenizer import CHAT_TEMPLATE as TEMPLATE
from tests.support.tiny_tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, tiny_tokenizer_json

__all__ = ["FILES", "tiny_card", "tiny_text"]

FILES = {TOKENIZER: tiny_tokenizer_json(), CHAT_TEMPLATE: TEMPLATE.encode()}


def tiny_card(name: str = "tiny", **changes: Any) -> ModelCard:
    """The card of a model with the tiny tokenizer."""
    fields: dict[str, Any] = {
        "architecture": "FakeForCausalLM",
        "family": "fake",
        "fingerprint": "f0",
        "vocab_size": VOCAB_SIZE,
        "max_model_len": 4096,
        "eos_token_ids": (END_OF_TEXT, IM_END),
        "blobs": {file: hashlib.sha256(content).hexdigest() for file, content in FILES.items()},
        "special_tokens": {"eos_token": "<|im_end|>"},
    }
    return ModelCard(name=name, **{**fields, **changes})


def tiny_text(*, template: str | None = TEMPLATE, tokenizer: bytes | None = None, **card: Any) -> Text:
    """The text side of the tiny model, or of one like it."""
    files = {TOKENIZER: tokenizer or FILES[TOKENIZER]}
    if template is not None:
        files[CHAT_TEMPLATE] = template.encode()
    return Text(tiny_card(**card), files)
