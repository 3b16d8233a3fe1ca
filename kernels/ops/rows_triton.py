"""The kernel of `halve_rows` and `round_rows`: one program per row, which it holds whole; one read and one write."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.activation_triton import activated
from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.math_triton import OPTIONS, round_to_fp8
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.ops.rows import LOWER_FP8
from headrace.kernels.spec import Activation

__all__ = ["halve_rows", "round_rows"]

# Eight values a thread are one 16-byte load of a 16-bit type; past 16 warps a row would wait for its own sums.
_VALUES_PER_WARP = 32 * 8
_MOST_WARPS = 16


def halve_rows(x: Tensor, dtype: torch.dtype, before: NormWeights | None = None) -> tuple[Tensor, Tensor]:
    """As `headrace.kernels.ops.rows.halve_rows`."""
    halves = torch.empty((2, *x.shape), dtype=dtype, device=x.device)
    factors = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch(x, before, halves, factors)
    return halves, factors


def round_rows(
    x: Tensor, before: NormWeights | None = None, *, activation: Activation | None = None, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """As `headrace.kernels.ops.rows.round_rows`."""
    width = x.shape[1] // (2 if gated else 1)
    rows = torch.empty((len(x), width), dtype=torch.float8_e4m3fn, device=x.device)
    factors = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    _launch(x, before, rows, factors, activation=activation, gated=gated)
    return rows, factors


def _launch(
    x: Tensor,
    before: NormWeights | None,
    out: Tensor,
    factors: Tensor,
    *,
    activation: Activation | None = None,
    gated: bool = False,
) -> None:
    if not len(x):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    width = out.shape[-1]
    block = triton.next_power_of_2(width)
    spec = None if before is None else before.spec
    _narrow[(len(x),)](
        x,
        None if before is None else before.weight,
        None if before is None else before.bias,
        out,
        factors,
        x.stride(0),
        len(x),
        0.0 if spec is None else spec.eps,
        WIDTH=width,
        BLOCK=block,
        NORM=None if spec is None else spec.kind,
        UNIT_OFFSET=spec is not None and spec.unit_offset,
        ACTIVATION=activation,
        GATED=gated,
        HALVES=out.dim() > x.dim(),
        WHOLE=out.dtype is torch.int8,
        LOWER=LOWER_FP8,
        num_warps=min(max(block // _VALUES_PER_WARP, 1), _MOST_WARPS),
        **chained(x.device),
        **OPTIONS,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _narrow(
    x,
    norm_weight,
    norm_bias,
    out,
    factors,
    x_stride,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HALVES: tl.constexpr,
    WHOLE: tl.constexpr,
    LOWER: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    held = columns < WIDTH
    if norm_weight is not None:
        scale = tl.load(norm_weight + columns, mask=held, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            scale += 1.0
    if norm_bias is not None:
        shift = tl.load(norm_bias + columns, mask=held, other=0.0).to(tl.float32)
    wait_for_earlier(CHAINED)
    values = tl.load(x + row * x_stride + columns, mask=held, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        values = activated(values, ACTIVATION)
    if GATED:
        values *= tl.load(x + row * x_stride + WIDTH + columns, mask=held, other=0.0).to(tl.float32)
    if NORM == "layer":
        mean = tl.sum(values, axis=0) / WIDTH
        values = tl.where(held, values - mean, 0.0)
    if NORM is not None:
        values *= 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    if norm_weight is not None:
        values *= scale
    if norm_bias is not None:
        values += shift

    LARGEST: tl.constexpr = 127.0 * 256.0 if WHOLE else 448.0
    finite = tl.abs(values) < float("inf")
    values = tl.where(finite, values, 0.0)
    largest = tl.max(tl.abs(values), axis=0)
    lost = tl.sum(tl.where(finite, 0, 1), axis=0)
    tl.store(factors + row, tl.where(lost > 0, float("nan"), largest / LARGEST))
    values *= LARGEST / tl.where(largest > 0.0, largest, 1.0)
    out += row * WIDTH + columns
    lower = out + num_rows.to(tl.int64) * WIDTH
    if WHOLE:
        whole = tl.where(values >= 0.0, values + 0.5, values - 0.5).to(tl.int32)
        upper = (whole + 128) >> 8
        tl.store(out, upper.to(tl.int8), mask=held)
        tl.store(lower, (whole - 256 * upper).to(tl.int8), mask=held)
    else:
        upper = round_to_fp8(values)
        tl.store(out, upper.to(out.dtype.element_ty), mask=held)
        if HALVES:
            tl.store(lower, round_to_fp8((values - upper) * LOWER).to(out.dtype.element_ty), mask=held)
