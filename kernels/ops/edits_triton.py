"""The kernels of `edit` and `count`.

`edit` is two launches. The first copies all logits and takes penalties off, for which it reads as much again of the
rows that have any. The second computes anew, from the logits as they were, the few tokens that are biased or held back.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.edits import EditTables
from headrace.kernels.ops.math_triton import OPTIONS

__all__ = ["count", "edit"]

_TILE = 1024  # eight for each thread of four warps
_BIASED = 256  # a loop's part of a row's list, which is seldom longer

# Each product is rounded before it is subtracted, as in the reference: the same logits everywhere.
_OPTIONS = OPTIONS | {"enable_fp_fusion": False}


def edit(logits: Tensor, tables: EditTables, rows: Tensor, positions: Tensor) -> Tensor:
    """As `headrace.kernels.ops.edits.edit`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab = logits.shape
    edited = torch.empty((num_rows, vocab), dtype=torch.float32, device=logits.device)
    if num_rows:
        # Where no row has penalties nothing is read of what rows have seen.
        seen = tables.biased if tables.seen is None else tables.seen
        common = (logits, logits.stride(0), vocab, tables.penalties, seen, rows)
        options = _OPTIONS | chained(logits.device)
        _edit[num_rows, triton.cdiv(vocab, _TILE)](*common, edited, TILE=_TILE, num_warps=4, **options)
        _edit_few[num_rows,](
            *common, positions, tables.biased, tables.biases, tables.limits, tables.biased.shape[1], edited,
            TILE=_BIASED, num_warps=4, **options,
        )  # fmt: skip
    return edited


def count(tokens: Tensor, tables: EditTables, rows: Tensor) -> None:
    """As `headrace.kernels.ops.edits.count`."""
    if tables.seen is not None and len(tokens):
        _count[len(tokens),](
            tokens, tables.seen, rows, tables.seen.shape[1], num_warps=1, **OPTIONS, **chained(tokens.device)
        )


@triton.jit
def _edit(
    logits, stride, vocab, penalties, seen, rows, edited,
    TILE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = token < vocab
    value = tl.load(logits + index * stride + token, mask=held, other=0.0).to(tl.float32)
    repetition = tl.load(penalties + row * 3)
    presence = tl.load(penalties + row * 3 + 1)
    frequency = tl.load(penalties + row * 3 + 2)
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        value = _penalized(
            value, tl.load(seen + row * vocab + token, mask=held, other=0), repetition, presence, frequency
        )
    tl.store(edited + index * vocab + token, value, mask=held)


@triton.jit(do_not_specialize=["positions"])  # whose alignment depends on the number of rows
def _edit_few(
    logits, stride, vocab, penalties, seen, rows, positions, biased, biases, limits, width, edited,
    TILE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index)
    is_early = tl.load(positions + index) < tl.load(limits + row * 3 + 2)
    held_back = tl.where(is_early, tl.load(limits + row * 3), 0)
    size = tl.load(limits + row * 3 + 1)
    repetition = tl.load(penalties + row * 3)
    presence = tl.load(penalties + row * 3 + 1)
    frequency = tl.load(penalties + row * 3 + 2)
    for begin in range(0, size, TILE):
        place = begin + tl.arange(0, TILE)
        listed = place < size
        token = tl.load(biased + row * width + place, mask=listed, other=0)
        value = tl.load(logits + index * stride + token, mask=listed, other=0.0).to(tl.float32)
        value += tl.load(biases + row * width + place, mask=listed, other=0.0)
        value = tl.where(place < held_back, float("-inf"), value)
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            value = _penalized(
                value, tl.load(seen + row * vocab + token, mask=listed, other=0), repetition, presence, frequency
            )
        tl.store(edited + index * vocab + token, value, mask=listed)


@triton.jit
def _count(tokens, seen, rows, vocab, CHAINED: tl.constexpr):
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    index = tl.program_id(0)
    token = tl.load(tokens + index)
    if token >= 0:
        place = seen + tl.load(rows + index) * vocab + token
        tl.store(place, tl.load(place) + 2)


@triton.jit
def _penalized(value, seen, repetition, presence, frequency):
    """Logits of tokens of which a row has seen so much; those that it has not stay."""
    occurrences = (seen >> 1).to(tl.float32)
    repeated = tl.where(value > 0.0, tl.div_rn(value, repetition), value * repetition)
    less = repeated - frequency * occurrences - tl.where(occurrences > 0.0, presence, 0.0)
    return tl.where(seen > 0, less, value)
