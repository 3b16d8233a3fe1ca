"""OPT, its 350m with norms behind and a narrow embedding, and Galactica with neither biases nor scales."""

from __future__ import annotations

from typing import Any

from headrace.kernels.policies.base import Policy, activation, stack
from headrace.kernels.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    LearnedPositions,
    MLPSpec,
    ModelSpec,
    NormSpec,
)

__all__ = ["OPT"]

_OFFSET = 2  # of the rows of positions, a left-over of the padding token's place


def _spec(config: Any) -> ModelSpec:
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = hidden // heads
    norm = NormSpec(kind="layer", eps=1e-5, affine=config.layer_norm_elementwise_affine)
    before = config.do_layer_norm_before
    layer = LayerSpec(
        placement="pre" if before else "post",
        norm=norm,
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=config.enable_bias,
            out_bias=config.enable_bias,
        ),
        mlp=MLPSpec(size=config.ffn_dim, activation=activation(config.activation_function), bias=config.enable_bias),
    )
    positions = LearnedPositions(count=config.max_position_embeddings + _OFFSET, offset=_OFFSET)
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        layers=(layer,) * config.num_hidden_layers,
        embedding=EmbeddingSpec(size=config.word_embed_proj_dim, positions=positions),
        final_norm=norm if before and not config._remove_final_layer_norm else None,
        head=HeadSpec(tied=config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
    )


_LAYER = "model.decoder.layers.{layer}"
OPT = Policy(
    family="opt",
    architectures=("OPTForCausalLM",),
    spec=_spec,
    prefix="model.",
    weights={
        "embedding.weight": stack("model.decoder.embed_tokens.weight"),
        "embedding_in.weight": stack("model.decoder.project_in.weight"),
        "embedding_out.weight": stack("model.decoder.project_out.weight"),
        "positions.weight": stack("model.decoder.embed_positions.weight"),
        "blocks.{layer}.attention_norm.weight": stack(f"{_LAYER}.self_attn_layer_norm.weight"),
        "blocks.{layer}.attention_norm.bias": stack(f"{_LAYER}.self_attn_layer_norm.bias"),
        **{
            f"blocks.{{layer}}.qkv.{kind}": stack(*(f"{_LAYER}.self_attn.{part}_proj.{kind}" for part in "qkv"))
            for kind in ("weight", "bias")
        },
        "blocks.{layer}.out.weight": stack(f"{_LAYER}.self_attn.out_proj.weight"),
        "blocks.{layer}.out.bias": stack(f"{_LAYER}.self_attn.out_proj.bias"),
        "blocks.{layer}.mlp_norm.weight": stack(f"{_LAYER}.final_layer_norm.weight"),
        "blocks.{layer}.mlp_norm.bias": stack(f"{_LAYER}.final_layer_norm.bias"),
        "blocks.{layer}.mlp.up.weight": stack(f"{_LAYER}.fc1.weight"),
        "blocks.{layer}.mlp.up.bias": stack(f"{_LAYER}.fc1.bias"),
        "blocks.{layer}.mlp.down.weight": stack(f"{_LAYER}.fc2.weight"),
        "blocks.{layer}.mlp.down.bias": stack(f"{_LAYER}.fc2.bias"),
        "final_norm.weight": stack("model.decoder.final_layer_norm.weight"),
        "final_norm.bias": stack("model.decoder.final_layer_norm.bias"),
        "head.weight": stack("lm_head.weight"),
    },
)
