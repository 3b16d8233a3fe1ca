"""Gemma 2 and 3: norms before and behind both parts, windows in most layers, soft caps (2) or norms of q and k (3)."""

from __future__ import annotations

from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies.base import Policy, activation, rotary_spec, stack
from headrace.kernels.policies.llama import decoder_weights
from headrace.kernels.spec import AttentionSpec, EmbeddingSpec, HeadSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec

__all__ = ["GEMMA2", "GEMMA3"]

_NORMS = {
    "after_attention.weight": stack("post_attention_layernorm.weight"),
    "mlp_norm.weight": stack("pre_feedforward_layernorm.weight"),
    "after_mlp.weight": stack("post_feedforward_layernorm.weight"),
}


def _spec(config: Any, *, qk_norm: bool, soft_cap: float | None) -> ModelSpec:
    if config.use_bidirectional_attention:
        raise UnsupportedModelError(
            "The model attends in both directions (use_bidirectional_attention), so it is no text generator. "
            "Choose a Gemma without it.",
            param="model",
        )
    norm = NormSpec(kind="rms", eps=config.rms_norm_eps, unit_offset=True)

    def layer(kind: str) -> LayerSpec:
        return LayerSpec(
            placement="sandwich",
            norm=norm,
            attention=AttentionSpec(
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                scale=config.query_pre_attn_scalar**-0.5,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                window=config.sliding_window if kind == "sliding_attention" else None,
                soft_cap=soft_cap,
                qk_norm=norm if qk_norm else None,
            ),
            rotary=rotary_spec(config, config.head_dim, layer_type=kind),
            mlp=MLPSpec(size=config.intermediate_size, activation=activation(config.hidden_activation), gated=True),
        )

    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=tuple(layer(kind) for kind in config.layer_types),
        embedding=EmbeddingSpec(size=config.hidden_size, scale=config.hidden_size**0.5),
        final_norm=norm,
        head=HeadSpec(tied=config.tie_word_embeddings, soft_cap=config.final_logit_softcapping),
        max_positions=config.max_position_embeddings,
    )


GEMMA2 = Policy(
    family="gemma2",
    architectures=("Gemma2ForCausalLM",),
    spec=lambda config: _spec(config, qk_norm=False, soft_cap=config.attn_logit_softcapping),
    weights=decoder_weights(_NORMS),
)
GEMMA3 = Policy(
    family="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    # Gemma 3's config still has attn_logit_softcapping, but its attention does not use it.
    spec=lambda config: _spec(config, qk_norm=True, soft_cap=None),
    weights=decoder_weights(
        {
            **_NORMS,
            "q_norm.weight": stack("self_attn.q_norm.weight"),
            "k_norm.weight": stack("self_attn.k_norm.weight"),
        }
    ),
)
