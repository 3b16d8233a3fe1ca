"""T5: v1.0 with relu, v1.1 and Flan with a gate; an encoder reads the prompt, a decoder writes the answer.

The encoder is also a model of its own.
"""

from __future__ import annotations

from typing import Any

from headrace.kernels.policies.base import Policy, Source, activation, stack
from headrace.kernels.spec import (
    AttentionSpec,
    EmbeddingSpec,
    EncoderSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RelativeBias,
)

__all__ = ["T5", "T5_ENCODER"]

_LENGTH = 4096  # relative positions have no longest text; the trained 512 is no limit


def _layer(config: Any, *, decoder: bool) -> LayerSpec:
    relative = RelativeBias(
        num_buckets=config.relative_attention_num_buckets, max_distance=config.relative_attention_max_distance
    )

    def attention(*, causal: bool, relative: RelativeBias | None) -> AttentionSpec:
        # Scores are not scaled; that is in the initialization of the queries.
        return AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.d_kv,
            scale=1.0,
            causal=causal,
            relative=relative,
        )

    return LayerSpec(
        placement="pre",
        norm=_norm(config),
        attention=attention(causal=decoder, relative=relative),
        cross=attention(causal=False, relative=None) if decoder else None,
        mlp=MLPSpec(size=config.d_ff, activation=activation(config.dense_act_fn), gated=config.is_gated_act),
    )


def _norm(config: Any) -> NormSpec:
    return NormSpec(kind="rms", eps=config.layer_norm_epsilon)


def _spec(config: Any) -> ModelSpec:
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        layers=(_layer(config, decoder=True),) * config.num_decoder_layers,
        embedding=EmbeddingSpec(size=config.d_model),
        final_norm=_norm(config),
        head=HeadSpec(
            tied=config.tie_word_embeddings, scale=config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        ),
        max_positions=_LENGTH,
        encoder=EncoderSpec(
            layers=(_layer(config, decoder=False),) * config.num_layers,
            final_norm=_norm(config),
            start_token=getattr(config, "decoder_start_token_id", None),
        ),
    )


def _encoder_spec(config: Any) -> ModelSpec:
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        layers=(_layer(config, decoder=False),) * config.num_layers,
        embedding=EmbeddingSpec(size=config.d_model),
        final_norm=_norm(config),
        head=None,
        max_positions=_LENGTH,
    )


def _stack(base: str, target: str, feed_forward: int) -> dict[str, Source]:
    """The weights of one of the two stacks, whose blocks end with part number `feed_forward`."""
    block = f"{base}.block.{{layer}}.layer"
    attention, dense = f"{block}.0.SelfAttention", f"{block}.{feed_forward}.DenseReluDense"
    return {
        f"{target}relative.weight": stack(f"{base}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        f"{target}blocks.{{layer}}.attention_norm.weight": stack(f"{block}.0.layer_norm.weight"),
        f"{target}blocks.{{layer}}.qkv.weight": stack(*(f"{attention}.{part}.weight" for part in "qkv")),
        f"{target}blocks.{{layer}}.out.weight": stack(f"{attention}.o.weight"),
        f"{target}blocks.{{layer}}.mlp_norm.weight": stack(f"{block}.{feed_forward}.layer_norm.weight"),
        f"{target}blocks.{{layer}}.mlp.up.weight": stack(
            f"{dense}.wi.weight|{dense}.wi_0.weight", f"{dense}.wi_1.weight?"
        ),
        f"{target}blocks.{{layer}}.mlp.down.weight": stack(f"{dense}.wo.weight"),
        f"{target}final_norm.weight": stack(f"{base}.final_layer_norm.weight"),
    }


_CROSS = "decoder.block.{layer}.layer.1"
T5 = Policy(
    family="t5",
    architectures=("T5ForConditionalGeneration",),
    spec=_spec,
    weights={
        "embedding.weight": stack("shared.weight"),
        **_stack("encoder", "encoder.", 1),
        **_stack("decoder", "", 2),
        "blocks.{layer}.cross.norm.weight": stack(f"{_CROSS}.layer_norm.weight"),
        "blocks.{layer}.cross.query.weight": stack(f"{_CROSS}.EncDecAttention.q.weight"),
        "blocks.{layer}.cross.key_value.weight": stack(
            f"{_CROSS}.EncDecAttention.k.weight", f"{_CROSS}.EncDecAttention.v.weight"
        ),
        "blocks.{layer}.cross.out.weight": stack(f"{_CROSS}.EncDecAttention.o.weight"),
        "head.weight": stack("lm_head.weight"),
    },
)
T5_ENCODER = Policy(
    family="t5-encoder",
    architectures=("T5EncoderModel",),
    spec=_encoder_spec,
    weights={"embedding.weight": stack("shared.weight"), **_stack("encoder", "", 1)},
)
