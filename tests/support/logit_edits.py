"""What edits of logits mean, told in full at every step: what `headrace.kernels.ops.edits` is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bias", "Penalties", "edit_logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """Values added to single logits; several for the same one add up."""

    rows: Tensor  # [N] int64
    tokens: Tensor  # [N] int64
    values: Tensor  # [N] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Tokens that rows have seen, each pair once, and what that costs."""

    rows: Tensor  # [N] int64
    tokens: Tensor  # [N] int64
    counts: Tensor  # [N] float32: occurrences in the output; 0 if only in the prompt
    repetition: Tensor  # [R] float32
    presence: Tensor  # [R] float32
    frequency: Tensor  # [R] float32


def edit_logits(logits: Tensor, bias: Bias, seen: Penalties) -> Tensor:
    """A copy with step 1 of `headrace.kernels.ops.sampling` done."""
    edited = logits.to(torch.float32, copy=True)
    edited.index_put_((bias.rows, bias.tokens), bias.values, accumulate=True)
    value = edited[seen.rows, seen.tokens]
    repetition = seen.repetition[seen.rows]
    value = torch.where(value > 0, value / repetition, value * repetition)
    value -= seen.frequency[seen.rows] * seen.counts
    value -= seen.presence[seen.rows] * (seen.counts > 0)
    edited[seen.rows, seen.tokens] = value
    return edited
