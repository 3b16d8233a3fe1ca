"""Norms and rotation of queries and keys, for the kernels that have them at hand."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["normed_and_rotated"]


@triton.jit
def normed_and_rotated(
    as_stored,
    start,
    dim,
    held,
    is_query,
    table,
    q_norm,
    k_norm,
    eps,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """Queries or keys [heads, dims] as attention takes them, in float32.

    Args:
        as_stored: the values, 0 where they are not held.
        start: where each head begins, [heads, 1]: for every value the other one of its pair is read from there.
        dim: [1, dims].
        held: [heads, dims].
        is_query: which norm's weight is a head's, [heads, 1].
        table: cosines and sines of the token's position; None if it does not turn anything.
        q_norm: weight of the queries' norm; None if it has none.
        k_norm: likewise of the keys'.
        eps: of the norm.
    """
    x = as_stored.to(tl.float32)
    rotated = dim < 2 * PAIRS
    if INTERLEAVED:
        is_first = dim % 2 == 0
        pair = dim // 2
        other_dim = tl.where(is_first, dim + 1, dim - 1)
    else:
        is_first = dim < PAIRS
        pair = tl.where(is_first, dim, dim - PAIRS)
        other_dim = tl.where(is_first, dim + PAIRS, dim - PAIRS)
    if PAIRS > 0:
        other = tl.load(start + other_dim, mask=held & rotated, other=0.0).to(tl.float32)
        cos = tl.load(table + pair, mask=rotated, other=1.0)
        sin = tl.load(table + PAIRS + pair, mask=rotated, other=0.0)

    if NORM != "none":
        if NORM == "layer":
            mean = (tl.sum(x, axis=1) / HEAD_DIM)[:, None]
            x = tl.where(held, x - mean, 0.0)
            if PAIRS > 0:
                other -= mean
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x *= scale
        if q_norm is not None:
            x *= _weight(q_norm, k_norm, is_query, dim, held, UNIT_OFFSET)
        if PAIRS > 0:
            other *= scale
            if q_norm is not None:
                other *= _weight(q_norm, k_norm, is_query, other_dim, held & rotated, UNIT_OFFSET)

    if PAIRS > 0:
        # The first of a pair becomes first * cos - second * sin, the second one second * cos + first * sin.
        turned = x * cos + tl.where(is_first, -other, other) * sin
        x = tl.where(rotated, turned, x)
    return x


@triton.jit
def _weight(q_norm, k_norm, is_query, dim, held, UNIT_OFFSET: tl.constexpr):
    """Scales of the queries' norm and the keys' norm, row by row."""
    of_query = tl.load(q_norm + dim + 0 * is_query, mask=held & is_query, other=0.0).to(tl.float32)
    of_key = tl.load(k_norm + dim + 0 * is_query, mask=held & ~is_query, other=0.0).to(tl.float32)
    scale = of_query + of_key
    return scale + 1.0 if UNIT_OFFSET else scale
