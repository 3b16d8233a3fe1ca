"""LLaMA 1 to 3.x, and what is built exactly like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies.base import Policy, rotary_spec
from headrace.kernels.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec

__all__ = ["LLAMA", "LLAMA_WEIGHTS", "llama_like"]

LLAMA_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "blocks.{}.attention_norm.weight": ("model.layers.{}.input_layernorm.weight",),
    "blocks.{}.qkv.weight": (
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "blocks.{}.qkv.bias": (
        "model.layers.{}.self_attn.q_proj.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        "model.layers.{}.self_attn.v_proj.bias",
    ),
    "blocks.{}.out.weight": ("model.layers.{}.self_attn.o_proj.weight",),
    "blocks.{}.out.bias": ("model.layers.{}.self_attn.o_proj.bias",),
    "blocks.{}.mlp_norm.weight": ("model.layers.{}.post_attention_layernorm.weight",),
    "blocks.{}.gate_up.weight": ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    "blocks.{}.gate_up.bias": ("model.layers.{}.mlp.gate_proj.bias", "model.layers.{}.mlp.up_proj.bias"),
    "blocks.{}.down.weight": ("model.layers.{}.mlp.down_proj.weight",),
    "blocks.{}.down.bias": ("model.layers.{}.mlp.down_proj.bias",),
    "final_norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}


def llama_like(config: Any, *, qkv_bias: bool, out_bias: bool, mlp_bias: bool) -> ModelSpec:
    """The spec of a model with LLaMA's block.

    Raises:
        UnsupportedModelError: its activation is another one.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"The model's activation is {config.hidden_act!r}; supported is silu. Choose another checkpoint.",
            param="model",
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    norm = NormSpec(eps=config.rms_norm_eps)
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        layer=LayerSpec(
            norm=norm,
            attention=AttentionSpec(
                num_heads=heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=qkv_bias,
                out_bias=out_bias,
            ),
            rotary=rotary_spec(config, head_dim),
            mlp=MLPSpec(size=config.intermediate_size, activation="silu", bias=mlp_bias),
        ),
        final_norm=norm,
        max_positions=config.max_position_embeddings,
        tied_head=config.tie_word_embeddings,
    )


def _spec(config: Any) -> ModelSpec:
    bias = config.attention_bias
    return llama_like(config, qkv_bias=bias, out_bias=bias, mlp_bias=config.mlp_bias)


LLAMA = Policy(family="llama", architectures=("LlamaForCausalLM",), spec=_spec, weights=LLAMA_WEIGHTS)
