"""Settings of one engine, checked once: sizes and limits, nothing that changes while it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace.errors import ConfigError

__all__ = ["QUANTIZATIONS", "EngineConfig"]

QUANTIZATIONS = ("int8", "fp8")  # headrace.kernels.quantize.SCHEMES, for who must not wait for torch

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes and limits of an engine.

    Attributes:
        max_model_len: most tokens of prompt and output together; None takes the model's own limit.
        max_num_seqs: most sequences that run at once.
        max_batch_tokens: token budget of one step; small keeps streams even, large reads prompts faster.
        block_size: tokens of one KV block.
        kv_tokens: tokens the KV cache holds; None sizes it from the memory.
        gpu_memory_utilization: share of a GPU's memory that the engine may hold.
        prefix_cache: whether sequences share the KV of equal beginnings.
        dtype: of weights and KV; "auto" takes the checkpoint's.
        quantize: int8 or fp8, in which the weights of layers are kept instead; None keeps them in `dtype`.
        async_scheduling: whether a step is launched before the tokens, or vectors, of the last one are read; None
            does so on a GPU.
        cuda_graphs: whether what a GPU computes is captured once and replayed, up to some size; a CPU has none.
        device: cpu, cuda or cuda:N; "auto" takes the first GPU if there is one.

    Raises:
        ConfigError: a value is out of range.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batch_tokens: int = 2048
    block_size: int = 16
    kv_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    prefix_cache: bool = True
    async_scheduling: bool | None = None
    cuda_graphs: bool = True
    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_batch_tokens", "block_size", "kv_tokens"):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "kv_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1.", param=name)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {share!r}; give a share of the GPU's memory, more than 0 and at most 1.",
                param="gpu_memory_utilization",
            )
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device is {self.device!r}; give auto, cpu, cuda or cuda:N.", param="device")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise ConfigError(
                f"quantize is {self.quantize!r}; give {' or '.join(QUANTIZATIONS)}, or None.", param="quantize"
            )
        if self.kv_tokens is not None and self.kv_tokens < self.block_size:
            raise ConfigError(
                f"kv_tokens is {self.kv_tokens}, less than one block of {self.block_size} tokens; raise it.",
                param="kv_tokens",
            )
