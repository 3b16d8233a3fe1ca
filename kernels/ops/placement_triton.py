"""The kernel of `place`: each program copies a part of a sequence's table; the first ones tell the rest as well."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.placement import EXPECTED, Placed

__all__ = ["place"]

_BLOCK = 1024  # entries of a table: eight, or two loads of 16 bytes, for each thread of four warps


def place(
    tokens: Tensor, positions: Tensor, rows: Tensor, tables: Tensor, last_tokens: Tensor, block_size: int
) -> Placed:
    """As `headrace.kernels.ops.placement.place`."""
    placed = Placed(
        token_ids=torch.empty_like(tokens),
        slots=torch.empty_like(tokens),
        context_lens=torch.empty_like(tokens, dtype=torch.int32),
        block_tables=torch.empty((len(tokens), tables.shape[1]), dtype=torch.int32, device=tokens.device),
    )
    assert tables.is_contiguous()
    if len(tokens):
        block = min(_BLOCK, triton.next_power_of_2(tables.shape[1]))
        _place[(len(tokens), triton.cdiv(tables.shape[1], block))](
            tokens, positions, rows, tables, last_tokens, *placed, block_size, tables.shape[1],
            EXPECTED=EXPECTED, BLOCK=block, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return placed


@triton.jit
def _place(
    tokens,
    positions,
    rows,
    tables,
    last_tokens,
    token_ids,
    slots,
    context_lens,
    block_tables,
    block_size,
    width,
    EXPECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    row = tl.load(rows + sequence)
    table = tables + row * width
    if tl.program_id(1) == 0:
        token = tl.load(tokens + sequence)
        if token == EXPECTED:
            token = tl.load(last_tokens + row)
        tl.store(token_ids + sequence, token)
        position = tl.load(positions + sequence)
        block = tl.load(table + position // block_size).to(tl.int64)
        tl.store(slots + sequence, block * block_size + position % block_size)
        tl.store(context_lens + sequence, (position + 1).to(tl.int32))
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = entry < width
    copied = tl.load(table + entry, mask=held, other=0)
    tl.store(block_tables + sequence.to(tl.int64) * width + entry, copied, mask=held)
