"""What the attention kernels share: from products of queries and keys to scores, and what is added to them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.math_triton import round_to_bfloat16, tanh
from headrace.kernels.ops.relative import relative_buckets
from headrace.kernels.spec import Alibi, AttentionSpec, RelativeBias

__all__ = ["WIDE_DOTS", "absorb", "added_tensors", "scores_of", "slopes_of"]

# The interpreter multiplies the bits of bfloat16, not the values.
WIDE_DOTS = triton.knobs.runtime.interpret


def added_tensors(
    spec: AttentionSpec, table: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Slopes [heads], table [buckets, heads] and buckets [2 * max distance + 1] of what is added to scores."""
    slopes = None if spec.alibi is None else _slopes(spec.alibi, device)
    if spec.relative is None:
        return slopes, None, None
    return slopes, table, _buckets(spec.relative, spec.causal, device)


@cache
def _slopes(alibi: Alibi, device: torch.device) -> Tensor:
    """[heads] float32."""
    slopes = torch.tensor(alibi.slopes, dtype=torch.float32)
    return (slopes.bfloat16().float() if alibi.rounded else slopes).to(device)


@cache
def _buckets(relative: RelativeBias, causal: bool, device: torch.device) -> Tensor:
    """[2 * max distance + 1] int32: the bucket of every distance; what is further away shares the last one."""
    distances = torch.arange(-relative.max_distance, relative.max_distance + 1)
    return relative_buckets(distances, relative, both_directions=not causal).int().to(device)


@triton.jit
def slopes_of(slopes, head, held_rows):
    """[rows, 1] of the heads."""
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + head, mask=held_rows, other=0.0)[:, None]
    return slope


@triton.jit
def scores_of(
    products,
    key,
    position,
    head,
    held_rows,
    slope,
    slopes,
    table,
    buckets,
    scale,
    soft_cap,
    alibi_scale,
    NUM_HEADS: tl.constexpr,
    MAX_DISTANCE: tl.constexpr,
    CAPPED: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Scores of products [rows, keys], and a factor that makes them powers of two, which is what the hardware has.

    `key` are the positions of the keys and `position` those of the queries, in shapes that fit the products. Where
    nothing is added, products are scores: the factor is rounded together with the difference to the largest.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    if not (CAPPED or slopes is not None or table is not None):
        return products, scale * LOG2_E
    scores = tanh(products * (scale / soft_cap)) * (soft_cap * LOG2_E) if CAPPED else products * (scale * LOG2_E)
    if slopes is not None:
        scores += _alibi(slope, key, position, ROUNDED) * (alibi_scale * LOG2_E)
    if table is not None:
        far = tl.minimum(tl.maximum(key - position, -MAX_DISTANCE), MAX_DISTANCE) + MAX_DISTANCE
        entry = tl.load(buckets + far) * NUM_HEADS + head[:, None]
        scores += tl.load(table + entry, mask=held_rows[:, None], other=0.0).to(tl.float32) * LOG2_E
    return scores, 1.0


@triton.jit
def _alibi(slope, key, position, ROUNDED: tl.constexpr):
    """Slope times distance, as far as a softmax sees it; rounded, the products with the positions are."""
    if ROUNDED:
        of_key = round_to_bfloat16(slope * round_to_bfloat16(key.to(tl.float32)))
        return of_key - round_to_bfloat16(slope * round_to_bfloat16(position.to(tl.float32)))
    return slope * (key - position).to(tl.float32)


@triton.jit
def absorb(scores, factor, v_tile, largest, total, found):
    """The running softmax after some more scores [rows, keys] and values [keys, dims].

    `largest` and `total` [rows] are the largest power and the sum of weights, `found` [rows, dims] the sum of weighted
    values, all float32; hidden scores are minus infinity. Weights are rounded to the type of the values.
    """
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * factor)
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores * factor - base[:, None])
    decay = tl.exp2(largest - base)
    total = total * decay + tl.sum(weights, axis=1)
    found = found * decay[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
    return new_largest, total, found
