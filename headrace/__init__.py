"""Headrace: a multi-process GPU worker pool behind a message queue, and the library that its workers run.

Importing this package is cheap: public names are loaded when first used. Those of the library (`init_inference` and
what belongs to it) need torch, those of the client do not.
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
    from headrace.workers.inference import InferenceConfig, InferenceEngine, init_inference, supported_models

__all__ = [
    "AsyncClient",
    "Client",
    "HeadraceError",
    "InferenceConfig",
    "InferenceEngine",
    "ModelCard",
    "SamplingParams",
    "__version__",
    "errors",
    "init_inference",
    "supported_models",
]

_HOME = {
    "AsyncClient": "headrace.client",
    "Client": "headrace.client",
    "HeadraceError": "headrace.errors",
    "InferenceConfig": "headrace.workers.inference",
    "InferenceEngine": "headrace.workers.inference",
    "ModelCard": "headrace.card",
    "SamplingParams": "headrace.sampling",
    "init_inference": "headrace.workers.inference",
    "supported_models": "headrace.workers.inference",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("headrace.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors"):
            raise
        text = f"headrace.{name} needs {error.name}, which the client does without: pip install 'headrace[serve]'"
        raise ModuleNotFoundError(text, name=error.name) from error


def __dir__() -> list[str]:
    return sorted(__all__)
