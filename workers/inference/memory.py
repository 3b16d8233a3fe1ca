"""Whether there is room on a device: for a model before it is read, and beside it for a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headrace.errors import ConfigError
from headrace.kernels.kv import KVCache
from headrace.kernels.quantize import find_scheme
from headrace.kernels.spec import ModelSpec
from headrace.workers.device import gpu_memory
from headrace.workers.estimate import blank_model, estimated_step, saved_by, weight_bytes
from headrace.workers.fits import as_argument, check_fits
from headrace.workers.inference.config import InferenceConfig
from headrace.workers.memory import Needs, available_bytes

if TYPE_CHECKING:
    from headrace.workers.inference.kind import Kind

__all__ = ["check_cache", "check_room"]

_BLOCK_SIZE = 16


def check_room(
    spec: ModelSpec, architecture: str, dtype: torch.dtype, device: torch.device, config: InferenceConfig
) -> None:
    """Refuse what certainly does not fit beside all else that is on a GPU now.

    Counted are the weights, and the cache of a text of `min_tokens` tokens that was written token by token, or what it
    takes to read such a text. Graphs come when they are first needed, if there is room, and longer texts as far as
    there is.

    Raises:
        ConfigError: it would fit with fewer `min_tokens`.
        ModelError: it does not fit at all.
    """
    if device.type != "cuda":
        return
    blank = blank_model(spec, dtype, find_scheme(config.quantize))
    tokens = config.min_tokens
    needs = Needs(
        weights=weight_bytes(blank),
        workspace=estimated_step(
            spec, dtype, tokens=tokens if spec.is_encoder else 1, rows=0 if spec.is_encoder else 1
        ),
        block=0 if spec.is_encoder else KVCache.bytes_per_block(spec, _BLOCK_SIZE, dtype),
        block_size=_BLOCK_SIZE,
        saved_by=saved_by(blank, device),
    )
    check_fits(
        gpu_memory(device, None),
        needs,
        name=f"The {architecture}",
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        asked="min_tokens" if tokens > 1 else None,
        least=1,
        spelled=as_argument,
    )


def check_cache(kind: Kind, tokens: int) -> None:
    """Refuse a model beside which there is no memory for a text of so many tokens.

    Raises:
        ConfigError: there is none, or the model is not made for so many.
    """
    if tokens > kind.max_tokens:
        raise ConfigError(
            f"min_tokens is {tokens}, but the model was made for {kind.max_tokens}; lower it.", param="min_tokens"
        )
    needed = kind.cache_bytes(tokens)
    free = torch.cuda.mem_get_info(kind.device)[0] if kind.device.type == "cuda" else available_bytes()
    if needed > free:
        raise ConfigError(
            f"{tokens} tokens (min_tokens) need {needed:,} bytes of cache, but {free:,} are free on {kind.device}; "
            "lower min_tokens, or use quantize='int8', a narrower dtype or a smaller model.",
            param="min_tokens",
        )
