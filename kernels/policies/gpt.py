"""GPT-2, GPT-J and GPT-NeoX (Pythia)."""

from __future__ import annotations

from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies.base import Policy, activation, rotary_of, rotary_spec, stack
from headrace.kernels.policies.layouts import per_group, transposed
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

__all__ = ["GPT2", "GPTJ", "GPT_NEOX"]


def _gpt2(config: Any) -> ModelSpec:
    if config.add_cross_attention:
        raise UnsupportedModelError(
            "The model has cross attention (add_cross_attention), which needs an encoder. Choose a GPT-2 without it.",
            param="model",
        )
    heads, hidden = config.n_head, config.n_embd
    head_dim = hidden // heads
    norm = NormSpec(kind="layer", eps=config.layer_norm_epsilon)
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0

    def layer(index: int) -> LayerSpec:
        return LayerSpec(
            placement="pre",
            norm=norm,
            attention=AttentionSpec(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=head_dim,
                scale=scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale,
                qkv_bias=True,
                out_bias=True,
            ),
            mlp=MLPSpec(
                size=config.n_inner or 4 * hidden, activation=activation(config.activation_function), bias=True
            ),
        )

    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        layers=tuple(layer(index) for index in range(config.n_layer)),
        embedding=EmbeddingSpec(size=hidden, positions=LearnedPositions(count=config.n_positions)),
        final_norm=norm,
        head=HeadSpec(tied=config.tie_word_embeddings),
        max_positions=config.n_positions,
    )


GPT2 = Policy(
    family="gpt2",
    architectures=("GPT2LMHeadModel",),
    spec=_gpt2,
    prefix="transformer.",
    weights={
        "embedding.weight": stack("transformer.wte.weight"),
        "positions.weight": stack("transformer.wpe.weight"),
        "blocks.{layer}.attention_norm.weight": stack("transformer.h.{layer}.ln_1.weight"),
        "blocks.{layer}.attention_norm.bias": stack("transformer.h.{layer}.ln_1.bias"),
        "blocks.{layer}.qkv.weight": stack("transformer.h.{layer}.attn.c_attn.weight", layout=transposed),
        "blocks.{layer}.qkv.bias": stack("transformer.h.{layer}.attn.c_attn.bias"),
        "blocks.{layer}.out.weight": stack("transformer.h.{layer}.attn.c_proj.weight", layout=transposed),
        "blocks.{layer}.out.bias": stack("transformer.h.{layer}.attn.c_proj.bias"),
        "blocks.{layer}.mlp_norm.weight": stack("transformer.h.{layer}.ln_2.weight"),
        "blocks.{layer}.mlp_norm.bias": stack("transformer.h.{layer}.ln_2.bias"),
        "blocks.{layer}.mlp.up.weight": stack("transformer.h.{layer}.mlp.c_fc.weight", layout=transposed),
        "blocks.{layer}.mlp.up.bias": stack("transformer.h.{layer}.mlp.c_fc.bias"),
        "blocks.{layer}.mlp.down.weight": stack("transformer.h.{layer}.mlp.c_proj.weight", layout=transposed),
        "blocks.{layer}.mlp.down.bias": stack("transformer.h.{layer}.mlp.c_proj.bias"),
        "final_norm.weight": stack("transformer.ln_f.weight"),
        "final_norm.bias": stack("transformer.ln_f.bias"),
        "head.weight": stack("lm_head.weight"),
    },
)


def _gptj(config: Any) -> ModelSpec:
    heads, hidden = config.n_head, config.n_embd
    head_dim = hidden // heads
    norm = NormSpec(kind="layer", eps=config.layer_norm_epsilon)
    layer = LayerSpec(
        placement="parallel",
        shared_norm=True,
        norm=norm,
        attention=AttentionSpec(num_heads=heads, num_kv_heads=heads, head_dim=head_dim, scale=head_dim**-0.5),
        rotary=rotary_of(10000.0, config.rotary_dim or head_dim, interleaved=True),
        mlp=MLPSpec(size=config.n_inner or 4 * hidden, activation=activation(config.activation_function), bias=True),
    )
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        layers=(layer,) * config.n_layer,
        embedding=EmbeddingSpec(size=hidden),
        final_norm=norm,
        head=HeadSpec(tied=config.tie_word_embeddings, bias=True),
        max_positions=config.n_positions,
    )


GPTJ = Policy(
    family="gptj",
    architectures=("GPTJForCausalLM",),
    spec=_gptj,
    prefix="transformer.",
    weights={
        "embedding.weight": stack("transformer.wte.weight"),
        "blocks.{layer}.attention_norm.weight": stack("transformer.h.{layer}.ln_1.weight"),
        "blocks.{layer}.attention_norm.bias": stack("transformer.h.{layer}.ln_1.bias"),
        "blocks.{layer}.qkv.weight": stack(
            "transformer.h.{layer}.attn.q_proj.weight",
            "transformer.h.{layer}.attn.k_proj.weight",
            "transformer.h.{layer}.attn.v_proj.weight",
        ),
        "blocks.{layer}.out.weight": stack("transformer.h.{layer}.attn.out_proj.weight"),
        "blocks.{layer}.mlp.up.weight": stack("transformer.h.{layer}.mlp.fc_in.weight"),
        "blocks.{layer}.mlp.up.bias": stack("transformer.h.{layer}.mlp.fc_in.bias"),
        "blocks.{layer}.mlp.down.weight": stack("transformer.h.{layer}.mlp.fc_out.weight"),
        "blocks.{layer}.mlp.down.bias": stack("transformer.h.{layer}.mlp.fc_out.bias"),
        "final_norm.weight": stack("transformer.ln_f.weight"),
        "final_norm.bias": stack("transformer.ln_f.bias"),
        "head.weight": stack("lm_head.weight"),
        "head.bias": stack("lm_head.bias"),
    },
)


def _gpt_neox(config: Any) -> ModelSpec:
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    norm = NormSpec(kind="layer", eps=config.layer_norm_eps)
    layer = LayerSpec(
        placement="parallel" if config.use_parallel_residual else "pre",
        norm=norm,
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
        ),
        rotary=rotary_spec(config, head_dim),
        mlp=MLPSpec(size=config.intermediate_size, activation=activation(config.hidden_act), bias=True),
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


_NEOX = "gpt_neox.layers.{layer}"
GPT_NEOX = Policy(
    family="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    spec=_gpt_neox,
    weights={
        "embedding.weight": stack("gpt_neox.embed_in.weight"),
        "blocks.{layer}.attention_norm.weight": stack(f"{_NEOX}.input_layernorm.weight"),
        "blocks.{layer}.attention_norm.bias": stack(f"{_NEOX}.input_layernorm.bias"),
        "blocks.{layer}.qkv.weight": stack(f"{_NEOX}.attention.query_key_value.weight", layout=per_group),
        "blocks.{layer}.qkv.bias": stack(f"{_NEOX}.attention.query_key_value.bias", layout=per_group),
        "blocks.{layer}.out.weight": stack(f"{_NEOX}.attention.dense.weight"),
        "blocks.{layer}.out.bias": stack(f"{_NEOX}.attention.dense.bias"),
        "blocks.{layer}.mlp_norm.weight": stack(f"{_NEOX}.post_attention_layernorm.weight"),
        "blocks.{layer}.mlp_norm.bias": stack(f"{_NEOX}.post_attention_layernorm.bias"),
        "blocks.{layer}.mlp.up.weight": stack(f"{_NEOX}.mlp.dense_h_to_4h.weight"),
        "blocks.{layer}.mlp.up.bias": stack(f"{_NEOX}.mlp.dense_h_to_4h.bias"),
        "blocks.{layer}.mlp.down.weight": stack(f"{_NEOX}.mlp.dense_4h_to_h.weight"),
        "blocks.{layer}.mlp.down.bias": stack(f"{_NEOX}.mlp.dense_4h_to_h.bias"),
        "final_norm.weight": stack("gpt_neox.final_layer_norm.weight"),
        "final_norm.bias": stack("gpt_neox.final_layer_norm.bias"),
        "head.weight": stack("embed_out.weight"),
    },
)
