"""Two products in one launch where both are of few rows, for which reading weights is all that takes time, or with one
pass between them; otherwise they are computed one after the other."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained
from headrace.kernels.ops.fp8_launch import linear_of_fp8_rows, rounded_between
from headrace.kernels.ops.gemv_two_triton import gemv_both, gemv_sum
from headrace.kernels.ops.keep_launch import launch_keep
from headrace.kernels.ops.linear import rounds
from headrace.kernels.ops.linear_triton import linear, norms, tiles_of
from headrace.kernels.ops.linears import Projection
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.rows import round_rows
from headrace.kernels.tuning import Tiles, row_bucket

__all__ = ["linear_both", "linear_chain", "linear_sum"]

# A sum of two products needs a few registers more than a product: of threads whose tile fills so many, just more than
# four programs of four warps can have. ptxas finds a way with those if it must; where it need not, it would take more.
_LARGE_TILE = 32
_MOST_REGISTERS = 128


def linear_both(x: Tensor, first: Projection, second: Projection) -> tuple[Tensor, Tensor]:
    """As `headrace.kernels.ops.linears.linear_both`."""
    tiles = _common_tiles((x, first.weight, first.gated), (x, second.weight, second.gated))
    if tiles is None or not _have_one_norm(tiles, first, second) or (first.scale is None) != (second.scale is None):
        return linear(x, **first._asdict()), linear(x, **second._asdict())
    x = _in_rows(x)
    if tiles.kernel == "keep":
        out, other_out = launch_keep(tiles, x, first, second)
        return out, other_out
    sizes = [len(part.weight) // (2 if part.gated else 1) for part in (first, second)]
    out, other_out = (torch.empty((len(x), size), dtype=x.dtype, device=x.device) for size in sizes)
    spec = None if first.before is None else first.before.spec
    gemv_both[(sum(triton.cdiv(size, tiles.block_n) for size in sizes),)](
        x,
        *_arguments(first),
        out,
        *_arguments(second),
        other_out,
        x.stride(0),
        len(x),
        0.0 if spec is None else spec.eps,
        N=sizes[0],
        OTHER_N=sizes[1],
        K=first.weight.shape[1],
        NORM=None if spec is None else spec.kind,
        UNIT_OFFSET=spec is not None and spec.unit_offset,
        ACTIVATION=first.activation,
        OTHER_ACTIVATION=second.activation,
        GATED=first.gated,
        OTHER_GATED=second.gated,
        **_settings(tiles, x, first.weight),
    )
    return out, other_out


def linear_sum(x: Tensor, first: Projection, other: Tensor, second: Projection, *, residual: Tensor) -> Tensor:
    """As `headrace.kernels.ops.linears.linear_sum`."""
    weight = first.weight
    tiles = _common_tiles((x, weight, False), (other, second.weight, False))
    if tiles is None or tiles.kernel != "gemv" or (first.scale is None) != (second.scale is None):
        return linear(other, **second._asdict(), residual=linear(x, **first._asdict(), residual=residual))
    x, other, residual = map(_in_rows, (x, other, residual))
    out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    gemv_sum[(triton.cdiv(len(weight), tiles.block_n),)](
        x,
        weight,
        first.bias,
        first.scale,
        other,
        second.weight,
        second.bias,
        second.scale,
        residual,
        out,
        x.stride(0),
        other.stride(0),
        residual.stride(0),
        len(x),
        N=len(weight),
        K=weight.shape[1],
        OTHER_K=second.weight.shape[1],
        **_settings(tiles, x, weight),
        **_bounded(tiles, weight),
    )
    return out


def linear_chain(x: Tensor, first: Projection, second: Projection, *, residual: Tensor | None = None) -> Tensor:
    """As `headrace.kernels.ops.linears.linear_chain`."""
    rounded = rounds(x, first.weight) and rounds(x, second.weight)
    if first.scale is None or second.scale is None or not rounded:
        return linear(linear(x, **first._asdict()), **second._asdict(), residual=residual)
    # What comes of the first is rounded as it is activated, in one pass.
    between = rounded_between(*round_rows(x, first.before), first)
    return linear_of_fp8_rows(*between, second, residual=residual, dtype=x.dtype)


def _common_tiles(*products: tuple[Tensor, Tensor, bool]) -> Tiles | None:
    """The tiles of the larger of some products (input, weight, whether it is gated), in which all can be computed at
    once; None if some are better computed otherwise."""
    tiles = [tiles_of(*product) for product in products]
    if {found.kernel for found in tiles} not in ({"gemv"}, {"keep"}):
        return None
    sizes = [weight.numel() for _, weight, _ in products]
    return tiles[sizes.index(max(sizes))]


def _have_one_norm(tiles: Tiles, first: Projection, second: Projection) -> bool:
    """Whether a kernel can take the norms of both, whose scales and shifts may differ, or neither has one."""
    if first.before is None or second.before is None:
        return first.before is second.before
    known = all(norms(tiles, part.before, part.folded, narrow=part.scale is not None) for part in (first, second))
    return known and first.before.spec == second.before.spec


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _arguments(part: Projection) -> tuple[Tensor | None, ...]:
    """What a kernel reads of a projection: weight, bias, factors of its rows, scale of the norm, and what is folded."""
    norm = part.before
    folded = part.folded if norm is not None and norm.spec.kind == "layer" else None
    return part.weight, part.bias, part.scale, None if norm is None else norm.weight, folded


def _settings(tiles: Tiles, x: Tensor, weight: Tensor) -> dict[str, Any]:
    return {
        "ROWS": row_bucket(len(x)),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "LANE": 16 // weight.element_size(),
        "num_warps": tiles.warps,
        "num_stages": 1,
        **chained(x.device),
        **OPTIONS,
    }


def _bounded(tiles: Tiles, weight: Tensor) -> dict[str, Any]:
    """A bound for the registers of `gemv_sum`, if it needs one."""
    size = tiles.block_n * tiles.block_k * weight.element_size() // (4 * 32 * tiles.warps)
    return {"maxnreg": _MOST_REGISTERS} if size == _LARGE_TILE else {}
