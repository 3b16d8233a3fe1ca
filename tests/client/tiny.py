"""The tiny model as a client sees it: a card, its files, and a `Text` of them."""

from __future__ import annotations

import hashlib
from typing import Any

from headrace.card import CHAT_TEMPLATE, TOKENIZER, ModelCard
from headrace.client.text import Text
from tests.support.tiny_tokenizer import CHAT_TEMPLATE as TEMPLATE
from tests.support.tiny_tokenizer import (
    ENCODER_VOCAB_SIZE,
    END_OF_TEXT,
    IM_END,
    MASK,
    VOCAB_SIZE,
    encoder_tokenizer_json,
    tiny_tokenizer_json,
)

__all__ = ["ENCODER_FILES", "FILES", "encoder_card", "tiny_card", "tiny_text"]

FILES = {TOKENIZER: tiny_tokenizer_json(), CHAT_TEMPLATE: TEMPLATE.encode()}
ENCODER_FILES = {TOKENIZER: encoder_tokenizer_json()}


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


def encoder_card(name: str = "reader", **changes: Any) -> ModelCard:
    """The card of an encoder with the tiny tokenizer, whose vectors have 6 numbers."""
    fields: dict[str, Any] = {
        "architecture": "FakeForMaskedLM",
        "vocab_size": ENCODER_VOCAB_SIZE,
        "max_model_len": 32,
        "eos_token_ids": (),
        "blobs": {file: hashlib.sha256(content).hexdigest() for file, content in ENCODER_FILES.items()},
        "special_tokens": {"mask_token": "[MASK]"},
        "tasks": ("embed", "fill_mask"),
        "embedding_size": 6,
        "pooling_defaults": {"pooling": "cls", "normalize": False},
        "mask_token_id": MASK,
    }
    return tiny_card(name, **{**fields, **changes})


def tiny_text(*, template: str | None = TEMPLATE, tokenizer: bytes | None = None, **card: Any) -> Text:
    """The text side of the tiny model, or of one like it."""
    files = {TOKENIZER: tokenizer or FILES[TOKENIZER]}
    if template is not None:
        files[CHAT_TEMPLATE] = template.encode()
    return Text(tiny_card(**card), files)
