"""Qwen2 and Qwen2.5: LLaMA's block with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies.base import Policy
from headrace.kernels.policies.llama import LLAMA_WEIGHTS, llama_like
from headrace.kernels.spec import ModelSpec

__all__ = ["QWEN2"]


def _spec(config: Any) -> ModelSpec:
    if "sliding_attention" in (config.layer_types or ()):
        raise UnsupportedModelError(
            "The model attends within a sliding window in some layers (use_sliding_window), which is not supported; "
            "choose a checkpoint without it.",
            param="model",
        )
    return llama_like(config, qkv_bias=True, out_bias=False, mlp_bias=False)


QWEN2 = Policy(family="qwen2", architectures=("Qwen2ForCausalLM",), spec=_spec, weights=LLAMA_WEIGHTS)
