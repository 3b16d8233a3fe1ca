"""Which kernel computes `linear`: ours for a few rows, where a product waits for its weight and everything else can be
done meanwhile; otherwise PyTorch's (cuBLAS), with kernels of our own before and after it."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.chain_triton import chained
from headrace.kernels.ops.dequantize import dequantize
from headrace.kernels.ops.fp8_launch import linear_of_fp8
from headrace.kernels.ops.gemv_triton import gemv
from headrace.kernels.ops.keep_launch import launch_keep
from headrace.kernels.ops.linear import product, rounds
from headrace.kernels.ops.linears import Projection
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.ops.rows import LOWER_FP8, halve_rows
from headrace.kernels.ops.skinny_triton import skinny
from headrace.kernels.quantize import NARROW
from headrace.kernels.spec import Activation
from headrace.kernels.tuning import MOST_ROWS, LinearShape, Tiles, row_bucket, tiles_for

__all__ = ["linear", "share_norm"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *NARROW)
_FEWEST_ROWS = 16  # of a product on tensor cores

# Counters of the tiles whose depth is cut into parts: as many as there may be tiles, for as many streams as may run at
# a time. They are zero between launches.
_MOST_TILES = 1024
_MOST_STREAMS = 64

# The interpreter multiplies the bits of bfloat16, not the values.
_WIDE_DOTS = triton.knobs.runtime.interpret


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    before: NormWeights | None = None,
    folded: Tensor | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As `headrace.kernels.ops.linear.linear`."""
    return run(
        tiles_of(x, weight, gated),
        x,
        weight,
        bias,
        scale=scale,
        before=before,
        folded=folded,
        activation=activation,
        gated=gated,
        residual=residual,
    )


def share_norm(x: Tensor, before: NormWeights) -> tuple[Tensor, NormWeights | None]:
    """As `headrace.kernels.ops.linear.share_norm`."""
    if len(x) == 1:
        return x, before
    return norm(x, *before), None


def run(
    tiles: Tiles,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    before: NormWeights | None = None,
    folded: Tensor | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` with tiles that are given; for measurements."""
    assert activation is not None or not gated, "a gate has an activation"
    if scale is not None and rounds(x, weight):
        return linear_of_fp8(x, Projection(weight, bias, scale, before, None, activation, gated), residual=residual)
    if before is not None and not norms(tiles, before, folded, narrow=scale is not None):
        x, before = norm(x, *before), None
    if tiles.kernel == "torch":
        return _torch(x, weight, bias, scale, activation, gated, residual)
    x = x if x.stride(1) == 1 else x.contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    if tiles.kernel == "keep":
        return launch_keep(
            tiles, x, Projection(weight, bias, scale, before, None, activation, gated), residual=residual
        )[0]
    out = torch.empty((len(x), len(weight) // (2 if gated else 1)), dtype=x.dtype, device=x.device)
    if tiles.kernel == "gemv":
        _gemv(tiles, x, weight, bias, scale, before, folded, activation, gated, residual, out)
    else:
        rows, factors = (x, None) if scale is None else halve_rows(x, weight.dtype, before)
        _skinny(tiles, rows, factors, weight, bias, scale, activation, gated, residual, out)
    return out


def tiles_of(x: Tensor, weight: Tensor, gated: bool) -> Tiles:
    """How `linear` computes a product of `x` [T, in]."""
    ours = 0 < len(x) <= MOST_ROWS and weight.dtype in _DTYPES and not weight.is_mkldnn and weight.is_contiguous()
    if not ours:
        return Tiles("torch")
    n, k = len(weight) // (2 if gated else 1), weight.shape[1]
    fp8 = weight.dtype is torch.float8_e4m3fn
    tiles = tiles_for(LinearShape(row_bucket(len(x)), n, k, gated, weight.element_size(), fp8), x.device)
    rounds_x = x.element_size() == 4  # tensor cores would, of float32
    return Tiles("torch") if tiles.kernel == "skinny" and rounds_x else tiles


def norms(tiles: Tiles, before: NormWeights | None, folded: Tensor | None, *, narrow: bool) -> bool:
    """Whether a kernel takes a norm itself, or there is none."""
    if before is None or tiles.kernel == "keep":
        return True
    if tiles.kernel == "skinny":
        return narrow
    return tiles.kernel == "gemv" and (before.spec.kind == "rms" or folded is not None)


def _torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: Activation | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    if scale is not None:
        weight = dequantize(weight, scale, x.dtype)
    if residual is not None and activation is None and bias is None and not weight.is_mkldnn:
        return residual.addmm_(x, weight.T)  # added on the way out, in float32
    out = product(x, weight, bias)
    if activation is not None:
        out = activate(out, activation, gated=gated)
    return out if residual is None else out.add_(residual)


def _gemv(
    tiles: Tiles,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    before: NormWeights | None,
    folded: Tensor | None,
    activation: Activation | None,
    gated: bool,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    n = out.shape[1]
    spec = None if before is None else before.spec
    gemv[(triton.cdiv(n, tiles.block_n),)](
        x,
        weight,
        bias,
        scale,
        None if before is None else before.weight,
        folded if spec is not None and spec.kind == "layer" else None,
        residual,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        len(x),
        0.0 if spec is None else spec.eps,
        N=n,
        K=weight.shape[1],
        NORM=None if spec is None else spec.kind,
        UNIT_OFFSET=spec is not None and spec.unit_offset,
        ACTIVATION=activation,
        GATED=gated,
        ROWS=row_bucket(len(x)),
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        LANE=16 // weight.element_size(),
        num_warps=tiles.warps,
        num_stages=1,
        **chained(x.device),
        **OPTIONS,
    )


def _skinny(
    tiles: Tiles,
    x: Tensor,
    factors: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: Activation | None,
    gated: bool,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    count, n = out.shape
    rows = max(_FEWEST_ROWS, tiles.block_m or row_bucket(count))
    columns, row_tiles = triton.cdiv(n, tiles.block_n), triton.cdiv(count, rows)
    parts = counters = None
    if tiles.splits > 1:
        assert columns * row_tiles <= _MOST_TILES, "so many tiles need not be cut"
        size = columns * row_tiles * tiles.splits * tiles.block_n * rows * (2 if gated else 1)
        parts = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
    skinny[(columns, tiles.splits, row_tiles)](
        x,
        weight,
        bias,
        factors,
        scale,
        residual,
        out,
        parts,
        counters,
        x.stride(-2),
        0 if residual is None else residual.stride(0),
        count,
        N=n,
        K=weight.shape[1],
        ACTIVATION=activation,
        GATED=gated,
        WIDE=_WIDE_DOTS and factors is None,
        SPLITS=tiles.splits,
        ROWS=rows,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        EARLY=tiles.early,
        AHEAD=tiles.ahead,
        LOWER=LOWER_FP8,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **chained(x.device),
        **OPTIONS,
    )


def _counters(device: torch.device) -> Tensor:
    """[tiles] int32, zero; of the current stream, for what runs on another may run at the same time."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters, streams = _all_counters(device)
    place = streams.setdefault(stream, len(streams) % _MOST_STREAMS)
    return counters[place]


@cache
def _all_counters(device: torch.device) -> tuple[Tensor, dict[int, int]]:
    """[streams, tiles] int32, and which is whose."""
    # In a graph, they would be zero only once it has run.
    assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run a step before one is captured"
    return torch.zeros((_MOST_STREAMS, _MOST_TILES), dtype=torch.int32, device=device), {}
