"""The kernel of `embed`: a program copies a part of one token's row.

Unlike others it begins when all before it is done: what comes after it may count on that
(`headrace.kernels.ops.chain_triton`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.math_triton import OPTIONS

__all__ = ["embed"]

# Eight values for each thread of four warps: one 16-byte load of a 16-bit type.
_BLOCK = 1024
_WARPS = 4


def embed(
    token_ids: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
    segments: Tensor | None = None,
    segment_table: Tensor | None = None,
) -> Tensor:
    """As `headrace.kernels.ops.embedding.embed`."""
    size = tokens.shape[1]
    out = torch.empty((len(token_ids), size), dtype=tokens.dtype, device=tokens.device)
    assert tokens.is_contiguous()
    assert position_table is None or (positions is not None and position_table.is_contiguous())
    assert segment_table is None or segment_table.is_contiguous()
    if len(token_ids):
        block = min(_BLOCK, triton.next_power_of_2(size))
        _embed[(len(token_ids), triton.cdiv(size, block))](
            token_ids, tokens, positions, position_table, segments, segment_table, out,
            len(tokens), 0 if position_table is None else len(position_table), scale, offset,
            SIZE=size, SEGMENTS=0 if segment_table is None else len(segment_table), BLOCK=block, num_warps=_WARPS,
            **OPTIONS,
        )  # fmt: skip
    return out


# Of what is read value by value, alignment depends on the number of tokens: no reason to compile again.
@triton.jit(do_not_specialize=["token_ids", "positions", "segments", "num_tokens", "num_positions", "offset"])
def _embed(
    token_ids,
    tokens,
    positions,
    position_table,
    segments,
    segment_table,
    out,
    num_tokens,
    num_positions,
    scale,
    offset,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _row(tokens, tl.load(token_ids + place), num_tokens, columns, SIZE) * scale
    if position_table is not None:
        value += _row(position_table, tl.load(positions + place) + offset, num_positions, columns, SIZE)
    if segment_table is not None:
        segment = tl.zeros((), tl.int64) if segments is None else tl.load(segments + place)
        value += _row(segment_table, segment, SEGMENTS, columns, SIZE)
    tl.store(out + place * SIZE + columns, value.to(out.dtype.element_ty), mask=columns < SIZE)


@triton.jit
def _row(table, index, count, columns, SIZE: tl.constexpr):
    """Of a table, in float32; NaN if it has no such row."""
    held = columns < tl.where((index >= 0) & (index < count), SIZE, 0)
    return tl.load(table + index * SIZE + columns, mask=held, other=float("nan")).to(tl.float32)
