"""The client library: text in, text out, over the broker; neither torch nor transformers, and cheap to import.

sync, aio    `Client` and `AsyncClient`, thin faces with the same names
core         what both share; batch is a `map` under way, over the bounded window of map
prepare      a caller's arguments made into a request
assemble     tokens made into deltas and completions
catalog      model cards and texts, fetched once; blobs keeps their files on disk
text         one model's tokenizer and chat template
template     chat templates in a sandbox
markers      keeps special tokens out of what users write
detokenizer  tokens to text, never half a character
stops        stop strings, never half of one leaked
transport    the one thread that owns the socket; inbox is where it puts news
session      the pure core: what to say to the broker and what the answers mean. Its parts: link (the connection),
             flights (requests), questions, receipts (acknowledgements), overdue (timeouts), outbox; events is its words
types        the values that a caller sees
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.client.aio import AsyncClient, AsyncStream
    from headrace.client.sync import Client, Stream
    from headrace.client.text import Text
    from headrace.client.types import (
        Choice,
        Completion,
        Delta,
        Embeddings,
        MapItem,
        MaskFill,
        Timeouts,
        TokenLogprob,
        TopLogprob,
        Usage,
    )

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "Completion",
    "Delta",
    "Embeddings",
    "MapItem",
    "MaskFill",
    "Stream",
    "Text",
    "Timeouts",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
]

_ELSEWHERE = {"AsyncClient": "aio", "AsyncStream": "aio", "Client": "sync", "Stream": "sync", "Text": "text"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'headrace.client' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headrace.client.{_ELSEWHERE.get(name, 'types')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
