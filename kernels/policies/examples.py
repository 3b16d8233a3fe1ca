"""Configs that stand for each family: those of well-known checkpoints, made here, and some that are refused.

The page docs/families.md (`headrace.kernels.policies.coverage`) is made of what the policies say to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

__all__ = ["Examples", "examples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What stands for one family.

    Attributes:
        covered: configs by the name of the checkpoint; between them they show all that its policy computes.
        refused: configs of the family that its policy refuses, one for each reason.
    """

    covered: dict[str, Any]
    refused: tuple[Any, ...]


def examples() -> dict[str, Examples]:
    """The examples of each family."""
    return {**_gpts(), **_alibis(), **_llamas(), **_gemmas(), **_with_encoders()}


def _rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


_DYNAMIC = _rope("dynamic", factor=2.0)
_NO_ACTIVATION = {"hidden_act": "mish"}


def _gpts() -> dict[str, Examples]:
    return {
        "gpt2": Examples(
            covered={
                "GPT-2": GPT2Config(),
                "GPT-2 of Mistral (CRFM)": GPT2Config(
                    scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True
                ),
            },
            refused=(GPT2Config(add_cross_attention=True), GPT2Config(activation_function="mish")),
        ),
        "gptj": Examples(covered={"GPT-J 6B": GPTJConfig()}, refused=(GPTJConfig(activation_function="mish"),)),
        "gpt_neox": Examples(
            covered={
                "GPT-NeoX 20B": GPTNeoXConfig(),
                "RedPajama INCITE 3B": GPTNeoXConfig(
                    hidden_size=2560,
                    intermediate_size=10240,
                    num_hidden_layers=32,
                    num_attention_heads=32,
                    use_parallel_residual=False,
                    **_rope("default", partial_rotary_factor=1.0),
                ),
            },
            refused=(GPTNeoXConfig(**_DYNAMIC), GPTNeoXConfig(**_NO_ACTIVATION)),
        ),
        "opt": Examples(
            covered={
                "OPT 125M": OPTConfig(),
                "OPT 350M": OPTConfig(
                    hidden_size=1024,
                    ffn_dim=4096,
                    num_hidden_layers=24,
                    num_attention_heads=16,
                    word_embed_proj_dim=512,
                    do_layer_norm_before=False,
                ),
                "Galactica 125M": OPTConfig(
                    vocab_size=50000,
                    activation_function="gelu",
                    enable_bias=False,
                    layer_norm_elementwise_affine=False,
                ),
            },
            refused=(OPTConfig(activation_function="mish"),),
        ),
    }


def _alibis() -> dict[str, Examples]:
    bloom = {"hidden_size": 1024, "n_layer": 24, "n_head": 16}
    new = {"new_decoder_architecture": True, "num_kv_heads": 8, "num_hidden_layers": 60}
    return {
        "bloom": Examples(
            covered={
                "BLOOM 560M": BloomConfig(**bloom),
                "with residuals from norms": BloomConfig(**bloom, apply_residual_connection_post_layernorm=True),
            },
            refused=(),
        ),
        "falcon": Examples(
            covered={
                "Falcon 7B": FalconConfig(),
                "Falcon 40B": FalconConfig(hidden_size=8192, num_attention_heads=128, ffn_hidden_size=32768, **new),
                "Falcon 11B": FalconConfig(
                    hidden_size=4096, num_attention_heads=32, ffn_hidden_size=16384, num_ln_in_parallel_attn=1, **new
                ),
                "Falcon RW 1B": FalconConfig(
                    vocab_size=50304,
                    hidden_size=2048,
                    num_hidden_layers=24,
                    num_attention_heads=32,
                    ffn_hidden_size=8192,
                    alibi=True,
                    bias=True,
                    multi_query=False,
                    parallel_attn=False,
                ),
            },
            refused=(FalconConfig(**_DYNAMIC), FalconConfig(activation="mish")),
        ),
    }


def _llamas() -> dict[str, Examples]:
    grouped = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    qwen2 = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    small = Qwen2Config(**qwen2, num_key_value_heads=2, tie_word_embeddings=True, **_rope("default", 1e6))
    return {
        "llama": Examples(
            covered={
                "Llama 2 7B": LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5),
                "Llama 3.1 8B": LlamaConfig(
                    vocab_size=128256,
                    max_position_embeddings=131072,
                    rms_norm_eps=1e-5,
                    **grouped,
                    **_rope("llama3", 5e5, factor=8.0, **llama3),
                ),
                "LongChat 7B": LlamaConfig(max_position_embeddings=16384, **_rope("linear", factor=8.0)),
                "YaRN Llama 2 7B": LlamaConfig(
                    max_position_embeddings=65536,
                    **_rope("yarn", factor=16.0, original_max_position_embeddings=4096),
                ),
                "with biases": LlamaConfig(attention_bias=True, mlp_bias=True),
            },
            refused=(LlamaConfig(**_DYNAMIC), LlamaConfig(**_NO_ACTIVATION)),
        ),
        "mistral": Examples(
            covered={
                "Mistral 7B v0.1": MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5),
                "Mistral 7B v0.3": MistralConfig(
                    vocab_size=32768,
                    max_position_embeddings=32768,
                    rms_norm_eps=1e-5,
                    sliding_window=None,
                    **_rope("default", 1e6),
                ),
            },
            refused=(MistralConfig(**_DYNAMIC), MistralConfig(**_NO_ACTIVATION)),
        ),
        "mixtral": Examples(
            covered={"Mixtral 8x7B": MixtralConfig()},
            refused=(MixtralConfig(**_DYNAMIC), MixtralConfig(**_NO_ACTIVATION)),
        ),
        "qwen2": Examples(
            covered={
                "Qwen2.5 0.5B": small,
                "with windows": Qwen2Config(use_sliding_window=True, max_window_layers=28, sliding_window=4096),
            },
            refused=(Qwen2Config(**_DYNAMIC), Qwen2Config(**_NO_ACTIVATION)),
        ),
        "qwen3": Examples(
            covered={
                "Qwen3 0.6B": Qwen3Config(
                    hidden_size=1024,
                    intermediate_size=3072,
                    num_hidden_layers=28,
                    num_attention_heads=16,
                    num_key_value_heads=8,
                    max_position_embeddings=40960,
                    tie_word_embeddings=True,
                    **_rope("default", 1e6),
                )
            },
            refused=(Qwen3Config(**_DYNAMIC), Qwen3Config(**_NO_ACTIVATION)),
        ),
        "phi3": Examples(
            covered={
                "Phi-3 mini 4K": Phi3Config(sliding_window=2047),
                "Phi-4": Phi3Config(
                    vocab_size=100352,
                    hidden_size=5120,
                    intermediate_size=17920,
                    num_hidden_layers=40,
                    num_attention_heads=40,
                    num_key_value_heads=10,
                    max_position_embeddings=16384,
                    **_rope("default", 25e4),
                ),
                "with partly rotated heads": Phi3Config(**_rope("default", partial_rotary_factor=0.75)),
            },
            refused=(
                # Phi-3 mini 128K and Phi-4 mini
                Phi3Config(
                    max_position_embeddings=131072,
                    **_rope("longrope", long_factor=[1.0] * 48, short_factor=[1.0] * 48),
                ),
                Phi3Config(**_NO_ACTIVATION),
            ),
        ),
    }


def _gemmas() -> dict[str, Examples]:
    return {
        "gemma2": Examples(
            covered={"Gemma 2 2B": Gemma2Config()},
            refused=(
                Gemma2Config(use_bidirectional_attention=True),
                Gemma2Config(**_DYNAMIC),
                Gemma2Config(hidden_activation="mish"),
            ),
        ),
        "gemma3_text": Examples(
            covered={
                "Gemma 3 270M": Gemma3TextConfig(
                    vocab_size=262144,
                    hidden_size=640,
                    intermediate_size=2048,
                    num_hidden_layers=18,
                    num_attention_heads=4,
                    num_key_value_heads=1,
                    sliding_window=512,
                    max_position_embeddings=32768,
                )
            },
            refused=(
                Gemma3TextConfig(use_bidirectional_attention=True),
                Gemma3TextConfig(
                    rope_parameters={
                        "full_attention": _DYNAMIC["rope_parameters"],
                        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    }
                ),
                Gemma3TextConfig(hidden_activation="mish"),
            ),
        ),
    }


def _with_encoders() -> dict[str, Examples]:
    roberta = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    flan = {"d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6}
    return {
        "bert": Examples(
            covered={
                "BERT base, states": BertConfig(architectures=["BertModel"]),
                "BERT base, masks": BertConfig(architectures=["BertForMaskedLM"]),
            },
            refused=(BertConfig(is_decoder=True), BertConfig(**_NO_ACTIVATION)),
        ),
        "roberta": Examples(
            covered={
                "RoBERTa base, states": RobertaConfig(architectures=["RobertaModel"], **roberta),
                "RoBERTa base, masks": RobertaConfig(architectures=["RobertaForMaskedLM"], **roberta),
            },
            refused=(RobertaConfig(is_decoder=True), RobertaConfig(**_NO_ACTIVATION)),
        ),
        "t5": Examples(
            covered={
                "T5 small": T5Config(),
                "Flan-T5 small": T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **flan),
            },
            refused=(T5Config(feed_forward_proj="mish"),),
        ),
        "t5-encoder": Examples(covered={"T5 small, encoder alone": T5Config()}, refused=()),
    }
