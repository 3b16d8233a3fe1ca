"""Whether there is room on a device: for a model before it is read, and beside it for a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headrace.errors import ConfigError, ModelError
from headrace.kernels.model import Model
from headrace.kernels.quantize import find_scheme
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.device import gpu_memory
from headrace.workers.inference.config import InferenceConfig
from headrace.workers.memory import available_bytes

if TYPE_CHECKING:
    from headrace.workers.inference.kind import Kind

__all__ = ["check_cache", "check_weights"]


def check_weights(checkpoint: Checkpoint, config: InferenceConfig, device: torch.device) -> None:
    """Refuse a model whose weights alone are more than a GPU has free; of other devices nothing is known.

    Raises:
        ModelError: it does not fit; the message has the arithmetic, and what would.
    """
    if device.type != "cuda":
        return
    memory, dtype = gpu_memory(device, 1.0), checkpoint.dtype(config.dtype)
    needed = _weight_bytes(checkpoint, dtype, config.quantize)
    if needed <= memory.allowed:
        return
    kept = config.quantize or str(dtype).removeprefix("torch.")
    remedies = []
    if config.quantize is None and (smaller := _weight_bytes(checkpoint, dtype, "int8")) <= memory.allowed:
        remedies.append(f"quantize='int8', with which they take {_gib(smaller)}")
    if dtype == torch.float32 and (smaller := _weight_bytes(checkpoint, torch.bfloat16, config.quantize)):
        remedies += [f"dtype='bfloat16', with which they take {_gib(smaller)}"] if smaller <= memory.allowed else []
    if needed <= memory.total and memory.held:
        remedies.append("ending what else runs on the GPU")
    raise ModelError(
        f"{checkpoint.architecture} does not fit on {device}: its weights in {kept} are {_gib(needed)}, but of "
        f"{_gib(memory.total)} only {_gib(memory.allowed)} can be had. What helps: "
        f"{'; '.join([*remedies, 'a larger GPU'])}; device='cpu'.",
        param="model",
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


def _weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype, quantize: str | None) -> int:
    blank = Model(checkpoint.spec, dtype=dtype, device="meta", scheme=find_scheme(quantize))
    return sum(weight.nbytes for weight in (*blank.parameters(), *blank.scales().values()))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
