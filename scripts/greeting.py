"""What `headrace up` tells when it is ready: where everything is, and a line to try."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.card import CHAT_TEMPLATE, ModelCard
from headrace.errors import UnavailableError
from headrace.scripts.terminal import printable
from headrace.tasks import GENERATE

if TYPE_CHECKING:
    from headrace.client import Client

__all__ = ["find_card", "has_chat", "ready_block"]


def find_card(client: Client, name: str, limit: float = 30.0) -> ModelCard:
    """The card of a model whose groups are ready, as soon as the broker shows it.

    Raises:
        UnavailableError: it does not within `limit` seconds.
    """
    deadline = time.monotonic() + limit
    while True:
        for card in client.models():
            if card.name == name:
                return card
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"The broker does not know the model {name} after {limit:g} s; see `headrace status`."
            )
        time.sleep(0.05)


def has_chat(card: ModelCard) -> bool:
    """Whether the model answers messages; others continue a text."""
    return CHAT_TEMPLATE in card.blobs


def ready_block(
    card: ModelCard, report: Mapping[str, Any], *, page: str | None, endpoint: str, needs_key: bool
) -> list[tuple[str, str]]:
    """Names and values, one line each."""
    groups = [group for group in report.get("groups", ()) if group.get("model") == card.name]
    seqs, tokens = (sum(int(group.get(key, 0)) for group in groups) for key in ("max_num_seqs", "kv_tokens"))
    size = f"{_parameters(card.num_parameters)} parameters, " if card.num_parameters else ""
    rows = [("chat page", page), ("API", f"{page}v1")] if page else []
    rows += [
        ("model", f"{printable(card.name)}  ({size}{_weights(card)})"),
        ("context", f"{card.max_model_len:,} tokens"),
    ]
    if GENERATE in card.tasks:
        rows.append(("KV cache", f"{tokens:,} tokens, up to {seqs} answers at once"))
    else:
        rows.append(("vectors", f"of {card.embedding_size:,} numbers, up to {seqs} texts at once"))
    rows.append(("try", _curl(card, page, needs_key)) if page else ("Python", f'headrace.Client("{endpoint}")'))
    return rows


def _weights(card: ModelCard) -> str:
    return f"{card.quantization} weights, {card.dtype}" if card.quantization else card.dtype


def _parameters(count: int) -> str:
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {letter}"
    return str(count)


def _curl(card: ModelCard, page: str, needs_key: bool) -> str:
    """A command line that gets an answer."""
    body: dict[str, Any] = {"model": card.name}
    if GENERATE not in card.tasks:
        path, body["input"] = "v1/embeddings", "Once upon a time"
    elif has_chat(card):
        path, body["messages"] = "v1/chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "v1/completions", "Once upon a time"
    key = ' -H "Authorization: Bearer $HEADRACE_API_KEY"' if needs_key else ""
    data = json.dumps(body).replace("'", "'\\''")
    return f"curl {page}{path} -H 'content-type: application/json'{key} -d '{data}'"
