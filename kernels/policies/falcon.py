"""Falcon: 7B (one kv head, parallel), 40B and 180B (groups, two norms), RW (ALiBi, one part after the other)."""

from __future__ import annotations

from typing import Any

from headrace.kernels.policies.base import Policy, activation, alibi, rotary_spec, stack
from headrace.kernels.policies.layouts import per_group
from headrace.kernels.spec import AttentionSpec, EmbeddingSpec, HeadSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec

__all__ = ["FALCON"]


def _spec(config: Any) -> ModelSpec:
    heads, head_dim = config.num_attention_heads, config.head_dim
    new = config.new_decoder_architecture
    norm = NormSpec(kind="layer", eps=config.layer_norm_epsilon)
    scale = head_dim**-0.5
    layer = LayerSpec(
        placement="parallel" if new or config.parallel_attn else "pre",
        shared_norm=not _two_norms(config) and (new or config.parallel_attn),
        norm=norm,
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=config.num_kv_heads if new else 1 if config.multi_query else heads,
            head_dim=head_dim,
            scale=scale,
            qkv_bias=config.bias,
            out_bias=config.bias,
            # Added before the scores are scaled, in the training's bfloat16.
            alibi=alibi(heads, rounded=True, scale=scale) if config.alibi else None,
        ),
        rotary=None if config.alibi else rotary_spec(config, head_dim),
        mlp=MLPSpec(size=config.ffn_hidden_size, activation=activation(config.activation), bias=config.bias),
    )
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=(layer,) * config.num_hidden_layers,
        embedding=EmbeddingSpec(size=config.hidden_size),
        final_norm=norm,
        head=HeadSpec(tied=config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
    )


def _two_norms(config: Any) -> bool:
    """Whether a parallel block has a norm for each part."""
    return bool(config.new_decoder_architecture) and config.num_ln_in_parallel_attn in (None, 2)


_LAYER = "transformer.h.{layer}"
FALCON = Policy(
    family="falcon",
    architectures=("FalconForCausalLM",),
    spec=_spec,
    prefix="transformer.",
    weights={
        "embedding.weight": stack("transformer.word_embeddings.weight"),
        "blocks.{layer}.attention_norm.weight": stack(f"{_LAYER}.input_layernorm.weight|{_LAYER}.ln_attn.weight"),
        "blocks.{layer}.attention_norm.bias": stack(f"{_LAYER}.input_layernorm.bias|{_LAYER}.ln_attn.bias"),
        "blocks.{layer}.qkv.weight": stack(f"{_LAYER}.self_attention.query_key_value.weight", layout=per_group),
        "blocks.{layer}.qkv.bias": stack(f"{_LAYER}.self_attention.query_key_value.bias", layout=per_group),
        "blocks.{layer}.out.weight": stack(f"{_LAYER}.self_attention.dense.weight"),
        "blocks.{layer}.out.bias": stack(f"{_LAYER}.self_attention.dense.bias"),
        "blocks.{layer}.mlp_norm.weight": stack(f"{_LAYER}.post_attention_layernorm.weight|{_LAYER}.ln_mlp.weight"),
        "blocks.{layer}.mlp_norm.bias": stack(f"{_LAYER}.post_attention_layernorm.bias|{_LAYER}.ln_mlp.bias"),
        "blocks.{layer}.mlp.up.weight": stack(f"{_LAYER}.mlp.dense_h_to_4h.weight"),
        "blocks.{layer}.mlp.up.bias": stack(f"{_LAYER}.mlp.dense_h_to_4h.bias"),
        "blocks.{layer}.mlp.down.weight": stack(f"{_LAYER}.mlp.dense_4h_to_h.weight"),
        "blocks.{layer}.mlp.down.bias": stack(f"{_LAYER}.mlp.dense_4h_to_h.bias"),
        "final_norm.weight": stack("transformer.ln_f.weight"),
        "final_norm.bias": stack("transformer.ln_f.bias"),
        "head.weight": stack("lm_head.weight"),
    },
)
