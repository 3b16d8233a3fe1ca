"""Launches `keep`, for one product of a row or for two."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained
from headrace.kernels.ops.keep_triton import keep
from headrace.kernels.ops.linears import Projection
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.tuning import Tiles

__all__ = ["launch_keep"]


def launch_keep(
    tiles: Tiles, x: Tensor, first: Projection, second: Projection | None = None, *, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """A product [1, out] of `x` [1, in], or two whose norms are of one kind; the residual [1, out] is of the first."""
    assert len(x) == 1, "one row is kept"
    assert first.weight.shape[1] <= tiles.block_k, "all of the row is kept"
    parts = [first] if second is None else [first, second]
    sizes = [len(part.weight) // (2 if part.gated else 1) for part in parts]
    outs = tuple(torch.empty((1, size), dtype=x.dtype, device=x.device) for size in sizes)
    counts = [triton.cdiv(size, tiles.block_n) for size in sizes]
    programs = [max(1, min(count, tiles.programs * count // sum(counts))) for count in counts]
    spec = None if first.before is None else first.before.spec
    keep[(sum(programs),)](
        x,
        *_tensors(first),
        residual,
        outs[0],
        *([None] * 5 if second is None else _tensors(second)),
        None if second is None else outs[1],
        0.0 if spec is None else spec.eps,
        N=sizes[0],
        OTHER_N=0 if second is None else sizes[1],
        K=first.weight.shape[1],
        NORM=None if spec is None else spec.kind,
        UNIT_OFFSET=spec is not None and spec.unit_offset,
        ACTIVATION=first.activation,
        OTHER_ACTIVATION=None if second is None else second.activation,
        GATED=first.gated,
        OTHER_GATED=second is not None and second.gated,
        PROGRAMS=programs[0],
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        LANE=16 // first.weight.element_size(),
        num_warps=tiles.warps,
        num_stages=1,
        **chained(x.device),
        **OPTIONS,
    )
    return outs


def _tensors(part: Projection) -> tuple[Tensor | None, ...]:
    """Weight, bias, factors of its rows, scale and shift of the norm."""
    return part.weight, part.bias, part.scale, *((None, None) if part.before is None else part.before[:2])
