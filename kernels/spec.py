"""What a model is, as data: sizes and choices that the one block and the one model shell are driven by.

A family never has a forward of its own; if one does not fit, a field is added here. Numbers only, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Activation",
    "Alibi",
    "AttentionSpec",
    "EmbeddingSpec",
    "EncoderSpec",
    "ExpertsSpec",
    "HeadSpec",
    "HeadTransform",
    "LayerSpec",
    "LearnedPositions",
    "MLPSpec",
    "ModelSpec",
    "NormSpec",
    "Placement",
    "RelativeBias",
    "RotarySpec",
]

# gelu is the exact one with erf; gelu_tanh its approximation (Hendrycks and Gimpel, 2016). They are not the same.
Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]

# Where the norms are:
#   pre       x + attention(norm(x)), then x + mlp(norm(x))
#   sandwich  as pre, with another norm behind attention and mlp each
#   post      norm(x + attention(x)), then norm(x + mlp(x))
#   parallel  x + attention(norm(x)) + mlp(norm(x))
Placement = Literal["pre", "sandwich", "post", "parallel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """A normalization over the last dimension.

    Attributes:
        kind: rms is root-mean-square (Zhang and Sennrich, 2019), layer subtracts the mean first (Ba et al., 2016).
        eps: added to the variance.
        unit_offset: the stored scale is what is added to 1.
        affine: whether there are a scale and, for layer, a shift.
    """

    kind: Literal["rms", "layer"]
    eps: float
    unit_offset: bool = False
    affine: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """Rotary positions (Su et al., 2021) on the first 2 * n values of a head, n being the number of frequencies.

    Attributes:
        inverse_frequencies: radians per position of each pair, scaling for long contexts included.
        attention_factor: multiplies sine and cosine; other than 1 for YaRN.
        interleaved: pairs are neighbours (0, 1), (2, 3), ...; otherwise value i belongs to value i + n.
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Alibi:
    """Scores fall with distance (Press et al., 2021): slope * position of the key is added after the scaling.

    Attributes:
        slopes: of each head.
        rounded: the products are rounded to bfloat16, as in the training of those that say so.
        scale: multiplies the products.
    """

    slopes: tuple[float, ...]
    rounded: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativeBias:
    """A learned number per head and bucket of distances is added to the scores (Raffel et al., 2020, "T5").

    Half of the buckets hold one distance each, the others grow towards `max_distance`; what is further away shares the
    last one. In both directions, keys after the query have buckets of their own.
    """

    num_buckets: int
    max_distance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Attention of `num_heads` query heads that share `num_kv_heads` heads of keys and values.

    Attributes:
        causal: a token sees itself and those before it; otherwise all of its text, and there is no cache.
        scale: multiplies the scores.
        qkv_bias: whether the stacked projection has a bias.
        out_bias: whether the output projection has one.
        window: tokens that a token sees, itself included; None for all before it.
        soft_cap: scores become cap * tanh(score / cap).
        alibi: adds to scores by distance.
        relative: adds to scores by bucket of distance; the table is shared by all layers.
        qk_norm: normalizes each head of queries and keys before they are rotated.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    soft_cap: float | None = None
    alibi: Alibi | None = None
    relative: RelativeBias | None = None
    qk_norm: NormSpec | None = None

    @property
    def qkv_size(self) -> int:
        """Rows of the stacked query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A feed-forward part of `count` experts, of which each token asks the likeliest `per_token` (Mixtral)."""

    count: int
    per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """Feed-forward part: down(activation(up(x))), or gated down(activation(gate(x)) * up(x)) with both stacked."""

    size: int
    activation: Activation
    gated: bool = False
    bias: bool = False
    experts: ExpertsSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One block.

    Attributes:
        placement: where the norms are.
        cross: attention to the states of an encoder, between the other two parts, with a norm of its own.
        norm: what all of them are.
        shared_norm: in a parallel block both parts read the same norm.
        residual_from_norm: what is carried past attention and feed-forward is the norm's output, not its input.
    """

    placement: Placement
    norm: NormSpec
    attention: AttentionSpec
    mlp: MLPSpec
    rotary: RotarySpec | None = None
    cross: AttentionSpec | None = None
    shared_norm: bool = False
    residual_from_norm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """A learned vector per position; row `position + offset` of a table of `count` rows."""

    count: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec:
    """What is done with a token before the first block.

    Attributes:
        size: values of the embedding; other than the hidden size, there is a projection to it and one back.
        scale: multiplies the embedding.
        positions: learned positions that are added.
        token_types: rows of a table of segments, whose vectors are added; 0 if there is none.
        norm: applied last.
    """

    size: int
    scale: float = 1.0
    positions: LearnedPositions | None = None
    token_types: int = 0
    norm: NormSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """What reads the prompt of an encoder-decoder; it shares the embedding.

    Attributes:
        layers: its blocks.
        final_norm: after the last of them.
        start_token: the first token that the decoder is given; None if the config does not say.
    """

    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    start_token: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTransform:
    """What BERT does before its head: a projection, an activation, a norm."""

    activation: Activation
    norm: NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """From the last hidden state to logits.

    Attributes:
        tied: the matrix is that of the embedding.
        soft_cap: as in attention.
        transform: done before.
        scale: multiplies the last hidden state.
    """

    tied: bool
    bias: bool = False
    soft_cap: float | None = None
    transform: HeadTransform | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder, or an encoder if its attention is not causal.

    Attributes:
        hidden_size: values per token between the layers.
        layers: the blocks; they may differ in anything but the sizes of keys and values.
        final_norm: after the last block, if there is one.
        head: None for an encoder that makes no logits.
        encoder: reads the prompt, which the layers attend to across.
        pooler: whether the first token's state goes through a projection and tanh, for the meaning of the whole text.
        max_positions: tokens that the positions were made for.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    embedding: EmbeddingSpec
    final_norm: NormSpec | None
    head: HeadSpec | None
    max_positions: int
    encoder: EncoderSpec | None = None
    pooler: bool = False

    @property
    def is_encoder(self) -> bool:
        """Whether every token sees the whole text, so that nothing can be generated."""
        return not self.layers[0].attention.causal
