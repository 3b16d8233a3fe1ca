"""What a model is, as data: sizes and choices that the one block and the one model shell are driven by.

A family never has a forward of its own; if one does not fit, a field is added here. Numbers only, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Activation", "AttentionSpec", "LayerSpec", "MLPSpec", "ModelSpec", "NormSpec", "RotarySpec"]

Activation = Literal["silu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """Root-mean-square normalization (Zhang and Sennrich, 2019) with a learned scale."""

    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """Rotary positions (Su et al., 2021): value i of a head turns with value i + n, n being the number of frequencies.

    Attributes:
        inverse_frequencies: radians per position of each pair, scaling for long contexts included.
        attention_factor: multiplies sine and cosine; other than 1 for YaRN.
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Causal attention of `num_heads` query heads that share `num_kv_heads` heads of keys and values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False

    @property
    def qkv_size(self) -> int:
        """Rows of the stacked query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """Gated feed-forward part: down(activation(gate(x)) * up(x)); gate and up are one stacked projection."""

    size: int
    activation: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One block: norm, attention, residual, norm, feed-forward, residual."""

    norm: NormSpec
    attention: AttentionSpec
    rotary: RotarySpec
    mlp: MLPSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder: token embedding, equal layers, final norm, head.

    Attributes:
        hidden_size: values per token between the layers.
        max_positions: tokens that the positions were made for.
        tied_head: the head is the embedding matrix.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    layer: LayerSpec
    final_norm: NormSpec
    max_positions: int
    tied_head: bool
