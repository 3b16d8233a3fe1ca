"""LLaMA 1 to 3.x, and the families that share its block: Mistral, Qwen2, Qwen3, Phi-3, Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.kernels.policies.base import Policy, Source, activation, rotary_spec, stack
from headrace.kernels.spec import (
    AttentionSpec,
    EmbeddingSpec,
    ExpertsSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
)

__all__ = ["LLAMA", "MISTRAL", "MIXTRAL", "PHI3", "QWEN2", "QWEN3", "decoder_weights"]


def decoder_weights(layer: Mapping[str, Source]) -> dict[str, Source]:
    """The weights of a decoder with LLaMA's names; `layer` adds to or replaces what a block has."""
    block = {
        "attention_norm.weight": stack("input_layernorm.weight"),
        "qkv.weight": stack("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv.bias": stack("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "out.weight": stack("self_attn.o_proj.weight"),
        "out.bias": stack("self_attn.o_proj.bias"),
        "mlp_norm.weight": stack("post_attention_layernorm.weight"),
        "mlp.up.weight": stack("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.up.bias": stack("mlp.gate_proj.bias", "mlp.up_proj.bias"),
        "mlp.down.weight": stack("mlp.down_proj.weight"),
        "mlp.down.bias": stack("mlp.down_proj.bias"),
        **layer,
    }
    return {
        "embedding.weight": stack("model.embed_tokens.weight"),
        **{
            f"blocks.{{layer}}.{name}": stack(*(f"model.layers.{{layer}}.{tensor}" for tensor in source.tensors))
            for name, source in block.items()
        },
        "final_norm.weight": stack("model.norm.weight"),
        "head.weight": stack("lm_head.weight"),
    }


def _llama_like(
    config: Any,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    experts: ExpertsSpec | None = None,
) -> ModelSpec:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    norm = NormSpec(kind="rms", eps=config.rms_norm_eps)
    rotary = rotary_spec(config, head_dim)
    mlp = MLPSpec(
        size=config.intermediate_size,
        activation=activation(config.hidden_act),
        gated=True,
        bias=mlp_bias,
        experts=experts,
    )

    def layer(window: int | None) -> LayerSpec:
        attention = AttentionSpec(
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            window=window,
            qk_norm=norm if qk_norm else None,
        )
        return LayerSpec(placement="pre", norm=norm, attention=attention, mlp=mlp, rotary=rotary)

    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=tuple(layer(window) for window in _windows(config)),
        embedding=EmbeddingSpec(size=config.hidden_size),
        final_norm=norm,
        head=HeadSpec(tied=config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
    )


def _windows(config: Any) -> list[int | None]:
    """The window of each layer: of those that layer_types names, or of all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


LLAMA = Policy(
    family="llama",
    architectures=("LlamaForCausalLM",),
    spec=lambda config: _llama_like(
        config, qkv_bias=config.attention_bias, out_bias=config.attention_bias, mlp_bias=config.mlp_bias
    ),
    weights=decoder_weights({}),
)
MISTRAL = Policy(family="mistral", architectures=("MistralForCausalLM",), spec=_llama_like, weights=decoder_weights({}))
QWEN2 = Policy(
    family="qwen2",
    architectures=("Qwen2ForCausalLM",),
    spec=lambda config: _llama_like(config, qkv_bias=True),
    weights=decoder_weights({}),
)
QWEN3 = Policy(
    family="qwen3",
    architectures=("Qwen3ForCausalLM",),
    spec=lambda config: _llama_like(
        config, qkv_bias=config.attention_bias, out_bias=config.attention_bias, qk_norm=True
    ),
    weights=decoder_weights(
        {"q_norm.weight": stack("self_attn.q_norm.weight"), "k_norm.weight": stack("self_attn.k_norm.weight")}
    ),
)
PHI3 = Policy(
    family="phi3",
    architectures=("Phi3ForCausalLM",),
    spec=_llama_like,
    weights=decoder_weights(
        {"qkv.weight": stack("self_attn.qkv_proj.weight"), "mlp.up.weight": stack("mlp.gate_up_proj.weight")}
    ),
)
MIXTRAL = Policy(
    family="mixtral",
    architectures=("MixtralForCausalLM",),
    spec=lambda config: _llama_like(
        config, experts=ExpertsSpec(count=config.num_local_experts, per_token=config.num_experts_per_tok)
    ),
    weights=decoder_weights(
        {
            "mlp.router.weight": stack("block_sparse_moe.gate.weight"),
            "mlp.up.weight": stack(
                "block_sparse_moe.experts.{expert}.w1.weight", "block_sparse_moe.experts.{expert}.w3.weight"
            ),
            "mlp.down.weight": stack("block_sparse_moe.experts.{expert}.w2.weight"),
        }
    ),
)
