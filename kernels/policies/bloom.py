"""BLOOM: ALiBi, and a norm behind the embedding."""

from __future__ import annotations

from typing import Any

from headrace.kernels.policies.base import Policy, alibi, stack
from headrace.kernels.policies.layouts import per_group
from headrace.kernels.spec import AttentionSpec, EmbeddingSpec, HeadSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec

__all__ = ["BLOOM"]

_TRAINED_LENGTH = 2048  # ALiBi has no longest text, and most configs name none


def _spec(config: Any) -> ModelSpec:
    heads, hidden = config.n_head, config.hidden_size
    head_dim = hidden // heads
    norm = NormSpec(kind="layer", eps=config.layer_norm_epsilon)
    layer = LayerSpec(
        placement="pre",
        norm=norm,
        residual_from_norm=config.apply_residual_connection_post_layernorm,
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=True,
            out_bias=True,
            alibi=alibi(heads),
        ),
        mlp=MLPSpec(size=4 * hidden, activation="gelu_tanh", bias=True),
    )
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        layers=(layer,) * config.n_layer,
        embedding=EmbeddingSpec(size=hidden, norm=norm),
        final_norm=norm,
        head=HeadSpec(tied=config.tie_word_embeddings),
        max_positions=getattr(config, "seq_length", None) or _TRAINED_LENGTH,
    )


_LAYER = "transformer.h.{layer}"
BLOOM = Policy(
    family="bloom",
    architectures=("BloomForCausalLM",),
    spec=_spec,
    prefix="transformer.",
    weights={
        "embedding.weight": stack("transformer.word_embeddings.weight"),
        "embedding_norm.weight": stack("transformer.word_embeddings_layernorm.weight"),
        "embedding_norm.bias": stack("transformer.word_embeddings_layernorm.bias"),
        "blocks.{layer}.attention_norm.weight": stack(f"{_LAYER}.input_layernorm.weight"),
        "blocks.{layer}.attention_norm.bias": stack(f"{_LAYER}.input_layernorm.bias"),
        "blocks.{layer}.qkv.weight": stack(f"{_LAYER}.self_attention.query_key_value.weight", layout=per_group),
        "blocks.{layer}.qkv.bias": stack(f"{_LAYER}.self_attention.query_key_value.bias", layout=per_group),
        "blocks.{layer}.out.weight": stack(f"{_LAYER}.self_attention.dense.weight"),
        "blocks.{layer}.out.bias": stack(f"{_LAYER}.self_attention.dense.bias"),
        "blocks.{layer}.mlp_norm.weight": stack(f"{_LAYER}.post_attention_layernorm.weight"),
        "blocks.{layer}.mlp_norm.bias": stack(f"{_LAYER}.post_attention_layernorm.bias"),
        "blocks.{layer}.mlp.up.weight": stack(f"{_LAYER}.mlp.dense_h_to_4h.weight"),
        "blocks.{layer}.mlp.up.bias": stack(f"{_LAYER}.mlp.dense_h_to_4h.bias"),
        "blocks.{layer}.mlp.down.weight": stack(f"{_LAYER}.mlp.dense_4h_to_h.weight"),
        "blocks.{layer}.mlp.down.bias": stack(f"{_LAYER}.mlp.dense_4h_to_h.bias"),
        "final_norm.weight": stack("transformer.ln_f.weight"),
        "final_norm.bias": stack("transformer.ln_f.bias"),
        "head.weight": stack("lm_head.weight"),
    },
)
