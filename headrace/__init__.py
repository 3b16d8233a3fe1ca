"""Headrace: a multi-process GPU worker pool behind a message queue.

Importing this package is cheap: public names are loaded when first used, and none of them needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headrace._version import __version__

if TYPE_CHECKING:
    from headrace.card import ModelCard
    from headrace.client import AsyncClient, Client
    from headrace.errors import HeadraceError
    from headrace.sampling import SamplingParams

__all__ = ["AsyncClient", "Client", "HeadraceError", "ModelCard", "SamplingParams", "__version__", "errors"]

_HOME = {
    "AsyncClient": "headrace.client",
    "Client": "headrace.client",
    "HeadraceError": "headrace.errors",
    "ModelCard": "headrace.card",
    "SamplingParams": "headrace.sampling",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("headrace.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
