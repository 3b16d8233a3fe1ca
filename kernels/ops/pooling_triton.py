"""The kernel of `pool`: a program reads some columns of all states of a text."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.math_triton import OPTIONS

__all__ = ["pool"]

# Four warps load 64 states at once, of each the 32 bytes that memory gives at least; few columns make many programs of
# one text.
_ROWS, _COLUMNS, _WARPS = 64, 16, 4


def pool(states: Tensor, starts: Tensor) -> Tensor:
    """As `headrace.kernels.ops.pooling.pool`."""
    texts, size = len(starts) - 1, states.shape[1]
    states = states if states.stride(1) == 1 else states.contiguous()
    out = torch.empty((2, texts, size), dtype=torch.float32, device=states.device)
    _pool[(triton.cdiv(size, _COLUMNS), texts)](
        states, starts, out, states.stride(0),
        SIZE=size, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS, **chained(states.device), **OPTIONS,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["starts"])
def _pool(
    states,
    starts,
    out,
    stride,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    wait_for_earlier(CHAINED)
    text = tl.program_id(1).to(tl.int64)
    start = tl.load(starts + text)
    stop = tl.load(starts + text + 1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    held = columns < SIZE
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(start, stop, ROWS):
        row = begin + tl.arange(0, ROWS)
        places = states + row.to(tl.int64)[:, None] * stride + columns[None, :]
        sums += tl.load(places, mask=(row < stop)[:, None] & held[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(sums, axis=0) / tl.maximum(stop - start, 1).to(tl.float32)
    first = tl.load(
        states + start.to(tl.int64) * stride + columns, mask=columns < tl.where(start < stop, SIZE, 0), other=0.0
    )
    place = out + text * SIZE + columns
    tl.store(place, mean, mask=held)
    tl.store(place + tl.num_programs(1).to(tl.int64) * SIZE, first.to(tl.float32), mask=held)
