"""The kernels of `experts`: two grouped products and a sum, whose launches depend on the number of tokens alone.

Token and expert make a pair. Pairs are sorted by expert, each expert's share is cut into tiles of rows, and there are
as many programs as the worst shares could need: each finds its tile from where the shares begin, which only the device
knows, or has nothing to do. Weights in 8 bits become numbers of x's type on their way to the tensor cores, which loses
nothing; their factors are for the sums. The sums of a token are taken in the order of its pairs, so they do not depend
on others.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from headrace.kernels.ops.activation_triton import activated
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.spec import MLPSpec

__all__ = ["experts"]

# Rows, columns, depth, warps and stages of a tile by bytes of a value. Few rows live from loads in flight, of which
# most are weights; many share the weights of a tile. All stay under 100 KB, which is what the smallest of today's GPUs
# have. Exact products of float32 are not for tensor cores.
_FEW_ROWS = {2: (16, 32, 128, 4, 4), 4: (16, 32, 32, 4, 2)}
_MANY_ROWS = {2: (64, 64, 64, 4, 3), 4: (16, 32, 32, 4, 2)}
_MOST_FEW = 16  # rows of an expert, in the mean
_SUM_BLOCK = 1024

# The interpreter multiplies the bits of bfloat16, not the values.
_WIDE_DOTS = triton.knobs.runtime.interpret


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor | nn.ParameterList,
    down: Tensor | nn.ParameterList,
    spec: MLPSpec,
    *,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `headrace.kernels.ops.experts.experts`."""
    assert isinstance(up, Tensor)
    assert isinstance(down, Tensor)
    assert all(tensor.is_contiguous() for tensor in (x, up, down))
    assert residual is None or residual.is_contiguous()
    num_tokens, hidden = x.shape
    per_token = chosen.shape[1]
    num_pairs = num_tokens * per_token
    out = torch.empty_like(x)
    if not num_pairs:
        return out
    by_expert, order = chosen.flatten().sort(stable=True)
    starts = torch.searchsorted(by_expert, _numbers(len(up) + 1, x.device))
    inner = torch.empty((num_pairs, spec.size), dtype=x.dtype, device=x.device)
    answers = torch.empty((num_pairs, hidden), dtype=torch.float32, device=x.device)
    few = num_pairs <= _MOST_FEW * len(up)
    rows, columns, depth, warps, stages = (_FEW_ROWS if few else _MANY_ROWS)[x.element_size()]
    most_tiles = min(num_pairs, (num_pairs + len(up) * (rows - 1)) // rows)
    settings = {
        "PER_TOKEN": per_token,
        "NUM_EXPERTS": len(up),
        "EXPERTS": max(2, triton.next_power_of_2(len(up))),
        "WIDE": _WIDE_DOTS,
        "ROWS": rows,
        "COLUMNS": columns,
        "DEPTH": depth,
        "num_warps": warps,
        "num_stages": stages,
        **OPTIONS,
    }
    _up[(most_tiles, triton.cdiv(spec.size, columns))](
        x,
        up,
        up_scale,
        inner,
        order,
        starts,
        HIDDEN=hidden,
        SIZE=spec.size,
        ACTIVATION=spec.activation,
        GATED=spec.gated,
        **settings,
    )
    _down[(most_tiles, triton.cdiv(hidden, columns))](
        inner, down, down_scale, answers, order, starts, weights.contiguous(), HIDDEN=hidden, SIZE=spec.size, **settings
    )
    block = min(_SUM_BLOCK, triton.next_power_of_2(hidden))
    _sum[(num_tokens, triton.cdiv(hidden, block))](
        answers, residual, out, HIDDEN=hidden, PER_TOKEN=per_token, BLOCK=block, num_warps=4, **OPTIONS
    )
    return out


@cache
def _numbers(count: int, device: torch.device) -> Tensor:
    """[count] int64, from 0."""
    return torch.arange(count, device=device)


@triton.jit
def _up(
    x,
    matrices,
    factors,
    inner,
    order,
    starts,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert, first, stop = _share(starts, NUM_EXPERTS, EXPERTS, ROWS)
    if first >= stop:
        return
    place = first + tl.arange(0, ROWS)
    held = place < stop
    token = tl.load(order + place, mask=held, other=0) // PER_TOKEN
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first_row = expert.to(tl.int64) * ((2 if GATED else 1) * SIZE)
    rows = x + token * HIDDEN
    value = _product(rows, matrices, factors, first_row, held, column, SIZE, HIDDEN, WIDE, ROWS, COLUMNS, DEPTH)
    value = activated(value, ACTIVATION)
    if GATED:
        first_row += SIZE
        value *= _product(rows, matrices, factors, first_row, held, column, SIZE, HIDDEN, WIDE, ROWS, COLUMNS, DEPTH)
    stored = held[:, None] & (column < SIZE)[None, :]
    tl.store(inner + place[:, None] * SIZE + column[None, :], value.to(inner.dtype.element_ty), mask=stored)


@triton.jit
def _down(
    inner,
    matrices,
    factors,
    answers,
    order,
    starts,
    weights,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert, first, stop = _share(starts, NUM_EXPERTS, EXPERTS, ROWS)
    if first >= stop:
        return
    place = first + tl.arange(0, ROWS)
    held = place < stop
    pair = tl.load(order + place, mask=held, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first_row = expert.to(tl.int64) * HIDDEN
    rows = inner + place * SIZE
    value = _product(rows, matrices, factors, first_row, held, column, HIDDEN, SIZE, WIDE, ROWS, COLUMNS, DEPTH)
    value *= tl.load(weights + pair, mask=held, other=0.0)[:, None]
    stored = held[:, None] & (column < HIDDEN)[None, :]
    tl.store(answers + pair[:, None] * HIDDEN + column[None, :], value, mask=stored)


@triton.jit
def _share(starts, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of this program's tile, and where its rows begin and its share ends; the same if there is none."""
    number = tl.arange(0, EXPERTS)
    known = number < NUM_EXPERTS
    begin = tl.load(starts + number, mask=known, other=0)
    end = tl.load(starts + number + 1, mask=known, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, axis=0)  # the tile after those of each
    tile = tl.program_id(0)
    expert = tl.sum(tl.where(known & (last <= tile), 1, 0), axis=0)
    mine = number == expert  # nobody's, if the tiles are all taken
    tile_of_expert = tile - tl.sum(tl.where(number < expert, tiles, 0), axis=0)
    first = tl.sum(tl.where(mine, begin, 0), axis=0) + tile_of_expert * ROWS
    stop = tl.sum(tl.where(mine, end, 0), axis=0)
    return expert, first, stop


@triton.jit
def _product(
    row_starts,
    matrices,
    factors,
    first_row,
    held,
    column,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows [ROWS, IN] times the transposed columns of a matrix [OUT, IN], in float32; it begins at a row of all."""
    matrix = matrices + first_row * IN
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, IN, DEPTH):
        inside = begin + depth < IN
        left = tl.load(row_starts[:, None] + begin + depth[None, :], mask=held[:, None] & inside[None, :], other=0.0)
        place = column[None, :].to(tl.int64) * IN + begin + depth[:, None]
        right = tl.load(matrix + place, mask=(column < OUT)[None, :] & inside[:, None], other=0.0)
        if WIDE:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total += tl.dot(left, right.to(left.dtype), input_precision="ieee")
    if factors is not None:
        total *= tl.load(factors + first_row + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _sum(answers, residual, out, HIDDEN: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < HIDDEN
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(PER_TOKEN):
        total += tl.load(answers + (token * PER_TOKEN + rank) * HIDDEN + column, mask=held, other=0.0)
    if residual is not None:
        total += tl.load(residual + token * HIDDEN + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=held)
