"""The library: one model in this process, its layers replaced by ours, used as transformers would use it.

    engine = headrace.init_inference(model_or_path)
    engine.generate(input_ids, max_new_tokens=50)

No socket, no broker, no other process; the pool (`headrace.workers.launcher`) is for serving.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.workers.inference.config import InferenceConfig
from headrace.workers.inference.engine import InferenceEngine, supported_models
from headrace.workers.inference.sources import load

if TYPE_CHECKING:
    import torch
    from torch import nn

    from headrace.kernels.policies.base import Policy

__all__ = ["InferenceConfig", "InferenceEngine", "init_inference", "supported_models"]


def init_inference(
    model_or_path: nn.Module | str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    max_tokens: int | None = None,
    policy: Policy | None = None,
    quantize: str | torch.dtype | None = None,
    config: InferenceConfig | dict[str, Any] | str | Path | None = None,
    **settings: Any,
) -> InferenceEngine:
    """Replace a model's layers by fused ones and return an engine that is used like the model.

    Args:
        model_or_path: a Hugging Face model, whose weights are moved out of it, one at a time; or a folder, a .gguf file
            or an id of the Hugging Face hub.
        dtype: of weights and activations; auto is the model's own.
        device: where it goes; None is the GPU if there is one, else the CPU.
        max_tokens: most tokens of one text, prompt and output together; None takes the model's own limit.
        policy: of a family that we do not ship (docs/library.md).
        quantize: int8 or fp8, in which the weights of layers are kept; None keeps them in `dtype`.
        config: all of these, and those of `settings`, in an InferenceConfig, a dict or a JSON file.
        settings: the other fields of InferenceConfig, and DeepSpeed's names of settings.

    Raises:
        ConfigError: a setting is unknown, out of range or cannot be honoured; the message says what to do.
        UnsupportedModelError: no policy covers the model; names the nearest.
        ModelError: its files or weights are missing, damaged or do not fit.
    """
    own = {"dtype": dtype, "device": device, "max_tokens": max_tokens, "policy": policy, "quantize": quantize}
    given = {name: value for name, value in own.items() if value is not None and value != "auto"}
    settled = InferenceConfig.of(config, **given, **settings)
    return InferenceEngine(load(model_or_path, settled), settled)
