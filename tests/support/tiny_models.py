"""Tiny models with random weights, written to a folder as transformers writes them: real files, milliseconds to run.

Sizes are odd on purpose (heads that are no power of two, grouped key heads, sizes that divide nothing), and the weights
are large, so that texts vary and a wrong layout cannot pass unnoticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    VOCAB_SIZE,
    tiny_tokenizer_json,
)

__all__ = ["FAMILIES", "T5_VARIANTS", "make_greedy", "make_model", "make_t5", "save_model", "save_t5"]

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
    "pad_token_id": None,
}

_GPT = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 72,
    "n_layer": 3,
    "n_head": 6,
    "n_inner": 100,
    "n_positions": 512,
    "initializer_range": 0.15,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": [IM_END, END_OF_TEXT],
}
_OPT = {"num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 100, "init_std": 0.15}
_FALCON = {"num_key_value_heads": None, "intermediate_size": None, "ffn_hidden_size": 100}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 4.0},
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


# name -> model type of transformers and what differs from _SIZES; None takes a setting out
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 20, "num_key_value_heads": 6}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama3-rope": (
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-linear-rope": ("llama", _rope("linear", factor=2.0)),
    "llama-yarn-rope": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 21}),
    # transformers' own experts need rows of a multiple of 16 bytes in narrow types.
    "mixtral": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None, "intermediate_size": 104},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 60}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "phi3": ("phi3", {"sliding_window": None, "pad_token_id": 0}),
    "phi3-partial-rope-window": (
        "phi3",
        {"sliding_window": 33, "pad_token_id": 0} | _rope("default", partial_rotary_factor=0.5),
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 20, "query_pre_attn_scalar": 24, "sliding_window": 17, "layer_types": _WINDOWS},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 24,
            "sliding_window": 17,
            "layer_types": _WINDOWS,
            "rope_parameters": _LOCAL_AND_GLOBAL,
        },
    ),
    "gpt2": ("gpt2", _GPT),
    "gpt2-scaled-by-layer": ("gpt2", _GPT | {"n_inner": None, "scale_attn_by_inverse_layer_idx": True}),
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _rope("default", partial_rotary_factor=0.5) | {"num_key_value_heads": None}),
    "gpt_neox-sequential": (
        "gpt_neox",
        _rope("default", partial_rotary_factor=1.0) | {"num_key_value_heads": None, "use_parallel_residual": False},
    ),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    "opt-galactica": (
        "opt",
        _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "bloom": (
        "bloom",
        {"n_head": 6, "num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None},
    ),
    "bloom-residual-from-norm": (
        "bloom",
        {
            "n_head": 6,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "intermediate_size": None,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "falcon-7b": ("falcon", _FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3}),
    "falcon-11b": (
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "falcon",
        _FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
}


def make_model(name: str = "qwen2-tied", *, seed: int = 0, **changes: Any) -> Any:
    """A transformers model in float32, biases and norms random too, so that leaving one out is seen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differences = FAMILIES[name]
    base = {} if model_type in ("gpt2", "gptj") else _SIZES
    settings = {name: value for name, value in (base | differences | changes).items() if value is not None}
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    # Asked for nothing, transformers 5.17 computes Gemma 2 by a function that knows no soft cap.
    attention = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=_center(parameter_name, model_type), std=0.2)
        if "gemma" in model_type:  # its embedding is scaled up and is the head: as it is, it would only repeat itself
            model.get_input_embeddings().weight.mul_(0.1)
    return model


def _center(parameter_name: str, model_type: str) -> float:
    """Around which value the scales of norms lie: 1, or 0 where they are added to 1. Biases and shifts lie around 0."""
    is_norm = any(part in parameter_name for part in ("norm", "ln_"))
    return 1.0 if is_norm and parameter_name.endswith("weight") and "gemma" not in model_type else 0.0


def save_model(folder: Path, name: str = "qwen2-tied", *, seed: int = 0, shards: bool = False, **changes: Any) -> Any:
    """Write a model with its tokenizer and chat template; returns the transformers model for comparison."""
    model = make_model(name, seed=seed, **changes)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "50GB")
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer_json())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    return model


def make_greedy(folder: Path) -> None:
    """Let a saved model's own settings draw nothing: one answer in 150 that is drawn is an end token alone."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(settings | {"do_sample": False}), encoding="utf-8")


# v1.0; v1.1 and Flan, with a head of their own and outputs that are not scaled; more layers on one side, and an inner
# size unlike the hidden one.
T5_VARIANTS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    "t5-deep-encoder": {"feed_forward_proj": "gated-silu", "num_layers": 4, "num_decoder_layers": 2},
}


def make_t5(name: str = "t5", *, seed: int = 0, **changes: Any) -> Any:
    """An encoder-decoder of transformers in float32."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 40,
        "d_kv": 12,
        "d_ff": 56,
        "num_heads": 5,
        "num_layers": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "decoder_start_token_id": 0,
        "eos_token_id": END_OF_TEXT,
    }
    config = T5Config(**settings | T5_VARIANTS[name] | changes)
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config).eval()
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "layer_norm" in parameter_name:
                parameter.normal_(mean=1.0, std=0.2)
            else:  # a small embedding, or a head that is tied to it would only repeat what it reads
                parameter.normal_(std=1.0 if "relative" in parameter_name else 0.25)
    return model


def save_t5(folder: Path, name: str = "t5", *, seed: int = 0) -> Any:
    """Write an encoder-decoder with its tokenizer; returns the transformers model for comparison."""
    model = make_t5(name, seed=seed)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer_json())
    return model
