"""Tiny models with random weights, written to a folder as transformers writes them: real files, milliseconds to run.

Sizes are odd on purpose (heads that are no power of two, grouped key heads, sizes that divide nothing), and the weights
are large, so that texts vary and a wrong layout cannot pass unnoticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, VOCAB_SIZE, tiny_tokenizer_json

__all__ = ["FAMILIES", "make_model", "save_model"]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": [IM_END, END_OF_TEXT],
}

# name -> model type of transformers and what differs from _SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 20, "num_key_value_heads": 6}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-yarn-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 60}),
}


def make_model(name: str = "qwen2-tied", *, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in float32, biases and norms random too, so that leaving one out is seen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differences = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **(_SIZES | differences | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0 if "norm" in parameter_name else 0.0, std=0.2)
    return model


def save_model(folder: Path, name: str = "qwen2-tied", *, seed: int = 0, shards: bool = False, **changes: Any) -> Any:
    """Write a model with its tokenizer and chat template; returns the transformers model for comparison."""
    model = make_model(name, seed=seed, **changes)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "50GB")
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer_json())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    return model
