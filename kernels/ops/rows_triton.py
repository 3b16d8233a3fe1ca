"""The kernel of `halve_rows` and `round_rows`: one program per row, which it holds whole; one read and one write. And
what is done to products before their factors are in them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.activation_triton import activated
from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.math_triton import OPTIONS, to_fp8
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.ops.norm_triton import norm_weights, normed
from headrace.kernels.ops.rows import LARGEST_FP8, LARGEST_WHOLE, LEAST, LOWER_FP8
from headrace.kernels.spec import Activation

__all__ = ["halve_rows", "round_rows"]

# Eight values a thread are one 16-byte load of a 16-bit type; past 16 warps a row would wait for its own sums.
_VALUES_PER_WARP = 32 * 8
_MOST_WARPS = 16
# Of threads with a long row's share of values, so that a processor has two such rows: one comes while one is computed.
_LONG_SHARE, _MOST_REGISTERS = 32, 64
_BLOCK = 1024  # of values that are finished by a program


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


def round_products(
    products: Tensor,
    factors: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation | None,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """`round_rows` of products * factors * scale + bias, activated; factors [T, 1], scale and bias as for products."""
    width = products.shape[1] // (2 if gated else 1)
    rows = torch.empty((len(products), width), dtype=torch.float8_e4m3fn, device=products.device)
    found = torch.empty((len(products), 1), dtype=torch.float32, device=products.device)
    _launch(products, None, rows, found, of=(factors, scale, bias), activation=activation, gated=gated)
    return rows, found


def finish_rows(products: Tensor, factors: Tensor, scale: Tensor, bias: Tensor | None, *, residual: Tensor) -> Tensor:
    """products [T, out] * factors [T, 1] * scale [out] + bias + residual, in the residual's place."""
    residual = residual if residual.is_contiguous() else residual.contiguous()
    num_rows, width = products.shape
    grid = (num_rows, triton.cdiv(width, _BLOCK))
    _finish[grid](
        products,
        factors,
        scale,
        bias,
        residual,
        WIDTH=width,
        BLOCK=_BLOCK,
        num_warps=_BLOCK // _VALUES_PER_WARP,
        **chained(products.device),
        **OPTIONS,
    )
    return residual


def _launch(
    x: Tensor,
    before: NormWeights | None,
    out: Tensor,
    factors: Tensor,
    *,
    of: tuple[Tensor | None, ...] = (None, None, None),
    activation: Activation | None = None,
    gated: bool = False,
) -> None:
    if not len(x):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    width = out.shape[-1]
    block = triton.next_power_of_2(width)
    warps = min(max(block // _VALUES_PER_WARP, 1), _MOST_WARPS)
    bounded = {"maxnreg": _MOST_REGISTERS} if block == 32 * warps * _LONG_SHARE else {}
    spec = None if before is None else before.spec
    _narrow[(len(x),)](
        x,
        None if before is None else before.weight,
        None if before is None else before.bias,
        *of,
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
        LARGEST=LARGEST_WHOLE if out.dtype is torch.int8 else LARGEST_FP8,
        LEAST=LEAST,
        LOWER=LOWER_FP8,
        num_warps=warps,
        **bounded,
        **chained(x.device),
        **OPTIONS,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _narrow(
    x,
    norm_weight,
    norm_bias,
    product_factors,
    product_scale,
    product_bias,
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
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    LOWER: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    held = columns < WIDTH
    scale, shift = norm_weights(norm_weight, norm_bias, columns, held, UNIT_OFFSET)
    wait_for_earlier(CHAINED)
    x += row * x_stride
    factor = 1.0
    if product_factors is not None:
        factor = tl.load(product_factors + row)
    values = _values(x, product_scale, product_bias, factor, columns, held)
    if ACTIVATION is not None:
        values = activated(values, ACTIVATION)
    if GATED:
        values *= _values(x, product_scale, product_bias, factor, WIDTH + columns, held)
    if NORM is not None:
        values = normed(values, norm_weight, norm_bias, scale, shift, held, eps, WIDTH, NORM == "layer")

    # Without their signs, bits of floats are in the order of these, behind them infinity, and what is no number.
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0).to(tl.float32, bitcast=True)
    finite = largest < float("inf")
    largest = tl.maximum(largest, LEAST)
    tl.store(factors + row, tl.where(finite, largest / LARGEST, float("nan")))
    values = tl.where(finite, values, 0.0) * (LARGEST / largest)
    out += row * WIDTH + columns
    lower = out + num_rows.to(tl.int64) * WIDTH
    if WHOLE:
        whole = tl.where(values >= 0.0, values + 0.5, values - 0.5).to(tl.int32)
        upper = (whole + 128) >> 8
        tl.store(out, upper.to(tl.int8), mask=held)
        tl.store(lower, (whole - 256 * upper).to(tl.int8), mask=held)
    else:
        upper = to_fp8(values)
        tl.store(out, upper, mask=held)
        if HALVES:
            tl.store(lower, to_fp8((values - upper.to(tl.float32)) * LOWER), mask=held)


@triton.jit
def _values(x, scale, bias, factor, columns, held):
    """Of a row, or of a row of products without their factors."""
    values = tl.load(x + columns, mask=held, other=0.0).to(tl.float32)
    if scale is not None:
        values *= factor * tl.load(scale + columns, mask=held, other=0.0)
    if bias is not None:
        values += tl.load(bias + columns, mask=held, other=0.0).to(tl.float32)
    return values


@triton.jit
def _finish(
    products,
    factors,
    scale,
    bias,
    residual,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = columns < WIDTH
    wait_for_earlier(CHAINED)
    values = _values(products + row * WIDTH, scale, bias, tl.load(factors + row), columns, held)
    place = residual + row * WIDTH + columns
    values += tl.load(place, mask=held, other=0.0).to(tl.float32)
    tl.store(place, values.to(residual.dtype.element_ty), mask=held)
