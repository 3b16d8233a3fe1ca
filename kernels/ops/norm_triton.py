"""The kernel of `norm`: one program per row, which it holds whole; one read and one write."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.spec import NormSpec

__all__ = ["norm"]

# Eight values a thread are one 16-byte load of a 16-bit type; past 16 warps a row would wait for its own sums.
_VALUES_PER_WARP = 32 * 8
_MOST_WARPS = 16


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec, *, residual: Tensor | None = None
) -> Tensor:
    """As `headrace.kernels.ops.norm.norm`."""
    width = x.shape[-1]
    rows = _rows(x)
    residual_rows = None if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    if len(rows):
        _norm[(len(rows),)](
            rows,
            residual_rows,
            weight,
            bias,
            out,
            rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            spec.eps,
            WIDTH=width,
            BLOCK=block,
            CENTERED=spec.kind == "layer",
            UNIT_OFFSET=spec.unit_offset,
            num_warps=min(max(block // _VALUES_PER_WARP, 1), _MOST_WARPS),
            **chained(x.device),
            **OPTIONS,
        )
    return out


def _rows(x: Tensor) -> Tensor:
    """A view [rows, width] if there is one, with neighbouring values side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _norm(
    x,
    residual,
    weight,
    bias,
    out,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTERED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    held = columns < WIDTH
    scale, shift = norm_weights(weight, bias, columns, held, UNIT_OFFSET)
    wait_for_earlier(CHAINED)
    values = tl.load(x + row * x_stride + columns, mask=held, other=0.0).to(tl.float32)
    if residual is not None:
        addend = tl.load(residual + row * residual_stride + columns, mask=held, other=0.0).to(tl.float32)
    values = normed(values, weight, bias, scale, shift, held, eps, WIDTH, CENTERED)
    if residual is not None:
        values += addend
    tl.store(out + row * WIDTH + columns, values.to(out.dtype.element_ty), mask=held)


@triton.jit
def norm_weights(weight, bias, columns, held, UNIT_OFFSET: tl.constexpr):
    """Scale and shift of a norm, numbers that nobody uses where there are none; they may be read before x is there."""
    scale = 1.0
    shift = 0.0
    if weight is not None:
        scale = tl.load(weight + columns, mask=held, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            scale += 1.0
    if bias is not None:
        shift = tl.load(bias + columns, mask=held, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def normed(values, weight, bias, scale, shift, held, eps, WIDTH: tl.constexpr, CENTERED: tl.constexpr):
    """A row, zero where it is not held, after its norm."""
    if CENTERED:
        mean = tl.sum(values, axis=0) / WIDTH
        values = tl.where(held, values - mean, 0.0)
    variance = tl.sum(values * values, axis=0) / WIDTH
    values *= 1.0 / tl.sqrt(variance + eps)
    if weight is not None:
        values *= scale
    if bias is not None:
        values += shift
    return values
