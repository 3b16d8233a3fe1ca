"""BERT and RoBERTa: encoders, with the head that fills masks, or one of a task, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.kernels.policies.base import Policy, Source, activation, stack
from headrace.kernels.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    HeadTransform,
    LayerSpec,
    LearnedPositions,
    MLPSpec,
    ModelSpec,
    NormSpec,
)

__all__ = ["BERT", "ROBERTA"]


def _spec(config: Any, *, first_position: int, pooled: tuple[str, ...]) -> ModelSpec:
    if config.is_decoder or config.add_cross_attention:
        raise UnsupportedModelError(
            "The model is a BERT that was made a decoder (is_decoder or add_cross_attention), which is not supported. "
            "Choose one that is an encoder.",
            param="model",
        )
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = hidden // heads
    norm = NormSpec(kind="layer", eps=config.layer_norm_eps)
    layer = LayerSpec(
        placement="post",
        norm=norm,
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            causal=False,
            qkv_bias=True,
            out_bias=True,
        ),
        mlp=MLPSpec(size=config.intermediate_size, activation=activation(config.hidden_act), bias=True),
    )
    name = (config.architectures or ["Model"])[0]
    # RoBERTa's head has GELU whatever the blocks have.
    transform = HeadTransform(activation="gelu" if first_position else activation(config.hidden_act), norm=norm)
    head = HeadSpec(tied=config.tie_word_embeddings, bias=True, transform=transform)
    positions = LearnedPositions(count=config.max_position_embeddings, offset=first_position)
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        layers=(layer,) * config.num_hidden_layers,
        embedding=EmbeddingSpec(size=hidden, positions=positions, token_types=config.type_vocab_size, norm=norm),
        final_norm=None,
        head=head if name.endswith("ForMaskedLM") else None,
        max_positions=config.max_position_embeddings - first_position,
        pooler=name.endswith(pooled),
    )


def _weights(base: str, head: Mapping[str, Source]) -> dict[str, Source]:
    layer = f"{base}.encoder.layer.{{layer}}"
    norms = {
        "embedding_norm": f"{base}.embeddings.LayerNorm",
        "blocks.{layer}.attention_norm": f"{layer}.attention.output.LayerNorm",
        "blocks.{layer}.mlp_norm": f"{layer}.output.LayerNorm",
    }
    modules = {
        "blocks.{layer}.out": f"{layer}.attention.output.dense",
        "blocks.{layer}.mlp.up": f"{layer}.intermediate.dense",
        "blocks.{layer}.mlp.down": f"{layer}.output.dense",
        "pooler": f"{base}.pooler.dense",
    }
    qkv = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    return {
        "embedding.weight": stack(f"{base}.embeddings.word_embeddings.weight"),
        "positions.weight": stack(f"{base}.embeddings.position_embeddings.weight"),
        "token_types.weight": stack(f"{base}.embeddings.token_type_embeddings.weight"),
        **{f"{name}.{kind}": _norm(module, kind) for name, module in norms.items() for kind in _KINDS},
        **{f"{name}.{kind}": stack(f"{module}.{kind}") for name, module in modules.items() for kind in _KINDS},
        **{f"blocks.{{layer}}.qkv.{kind}": stack(*(f"{part}.{kind}" for part in qkv)) for kind in _KINDS},
        **head,
    }


_KINDS = ("weight", "bias")


def _norm(module: str, kind: str) -> Source:
    """The scale or the shift of a norm, which the oldest checkpoints call gamma and beta."""
    return stack(f"{module}.{kind}|{module}.{'gamma' if kind == 'weight' else 'beta'}")


# What a task's head reads of the model is as it is in transformers: the first token's state is pooled for some.
_TASKS = ("ForMultipleChoice", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")

BERT = Policy(
    family="bert",
    architectures=("BertModel", "BertForMaskedLM"),
    tasks=("BertForNextSentencePrediction", *(f"Bert{task}" for task in _TASKS)),
    spec=lambda config: _spec(
        config,
        first_position=0,
        pooled=("Model", "ForMultipleChoice", "ForNextSentencePrediction", "ForSequenceClassification"),
    ),
    prefix="bert.",
    weights=_weights(
        "bert",
        {
            "head_dense.weight": stack("cls.predictions.transform.dense.weight"),
            "head_dense.bias": stack("cls.predictions.transform.dense.bias"),
            "head_norm.weight": _norm("cls.predictions.transform.LayerNorm", "weight"),
            "head_norm.bias": _norm("cls.predictions.transform.LayerNorm", "bias"),
            "head.weight": stack("cls.predictions.decoder.weight"),
            "head.bias": stack("cls.predictions.decoder.bias|cls.predictions.bias"),
        },
    ),
)
ROBERTA = Policy(
    family="roberta",
    architectures=("RobertaModel", "RobertaForMaskedLM"),
    tasks=tuple(f"Roberta{task}" for task in _TASKS),
    # Positions count from the one after the padding token's id.
    spec=lambda config: _spec(config, first_position=config.pad_token_id + 1, pooled=("Model", "ForMultipleChoice")),
    prefix="roberta.",
    weights=_weights(
        "roberta",
        {
            "head_dense.weight": stack("lm_head.dense.weight"),
            "head_dense.bias": stack("lm_head.dense.bias"),
            "head_norm.weight": stack("lm_head.layer_norm.weight"),
            "head_norm.bias": stack("lm_head.layer_norm.bias"),
            "head.weight": stack("lm_head.decoder.weight"),
            "head.bias": stack("lm_head.decoder.bias|lm_head.bias"),
        },
    ),
)
