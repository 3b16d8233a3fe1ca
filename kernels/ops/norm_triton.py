"""The kernel of `norm` and `add_norm`: one program per row, which it holds whole; one read and one write."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.spec import NormSpec

__all__ = ["add_norm", "norm"]

# Eight values a thread are one 16-byte load of a 16-bit type; past 16 warps a row would wait for its own sums.
_VALUES_PER_WARP = 32 * 8
_MOST_WARPS = 16


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """As `headrace.kernels.ops.norm.norm`."""
    return _launch(x, None, weight, bias, spec)[0]


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor]:
    """As `headrace.kernels.ops.norm.add_norm`."""
    return _launch(x, residual, weight, bias, spec)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = _rows(x)
    residual_rows = None if residual is None else _rows(residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(normed)
    block = triton.next_power_of_2(width)
    if len(rows):
        _norm[(len(rows),)](
            rows,
            residual_rows,
            weight,
            bias,
            normed,
            total,
            rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            spec.eps,
            WIDTH=width,
            BLOCK=block,
            CENTERED=spec.kind == "layer",
            UNIT_OFFSET=spec.unit_offset,
            num_warps=min(max(block // _VALUES_PER_WARP, 1), _MOST_WARPS),
            **OPTIONS,
        )
    return normed, x if total is None else total


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
    normed,
    total,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTERED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    held = columns < WIDTH
    values = tl.load(x + row * x_stride + columns, mask=held, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + columns, mask=held, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + columns, rounded, mask=held)
        values = rounded.to(tl.float32)  # what is carried on is what is normalized
    if CENTERED:
        mean = tl.sum(values, axis=0) / WIDTH
        values = tl.where(held, values - mean, 0.0)
    variance = tl.sum(values * values, axis=0) / WIDTH
    values *= 1.0 / tl.sqrt(variance + eps)
    if weight is not None:
        scale = tl.load(weight + columns, mask=held, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            scale += 1.0
        values *= scale
    if bias is not None:
        values += tl.load(bias + columns, mask=held, other=0.0).to(tl.float32)
    tl.store(normed + row * WIDTH + columns, values.to(normed.dtype.element_ty), mask=held)
