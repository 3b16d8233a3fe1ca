"""Launches `keep`, for one product of a row or for two."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained
from headrace.kernels.ops.keep_triton import keep
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.spec import Activation
from headrace.kernels.tuning import Tiles

__all__ = ["Kept", "launch_keep"]


class Kept(NamedTuple):
    """A product, with names as `headrace.kernels.ops.linear.linear` has them, and where it goes: out [1, out]."""

    weight: Tensor
    bias: Tensor | None
    before: NormWeights | None
    activation: Activation | None
    gated: bool
    out: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, scale and shift of the norm."""
        return self.weight, self.bias, *((None, None) if self.before is None else self.before[:2])


def launch_keep(
    tiles: Tiles, x: Tensor, first: Kept, second: Kept | None = None, *, residual: Tensor | None = None
) -> None:
    """Compute a product of `x` [1, in], or two whose norms are of one kind; the residual [1, out] is of the first."""
    assert len(x) == 1, "one row is kept"
    assert first.weight.shape[1] <= tiles.block_k, "all of the row is kept"
    parts = [first] if second is None else [first, second]
    counts = [triton.cdiv(part.out.shape[1], tiles.block_n) for part in parts]
    programs = [max(1, min(count, tiles.programs * count // sum(counts))) for count in counts]
    spec = None if first.before is None else first.before.spec
    other = second or first._replace(activation=None, gated=False)
    keep[(sum(programs),)](
        x,
        *first.tensors,
        residual,
        first.out,
        *((None, None, None, None) if second is None else second.tensors),
        None if second is None else second.out,
        0.0 if spec is None else spec.eps,
        N=first.out.shape[1],
        OTHER_N=0 if second is None else second.out.shape[1],
        K=first.weight.shape[1],
        NORM=None if spec is None else spec.kind,
        UNIT_OFFSET=spec is not None and spec.unit_offset,
        ACTIVATION=first.activation,
        OTHER_ACTIVATION=other.activation,
        GATED=first.gated,
        OTHER_GATED=other.gated,
        PROGRAMS=programs[0],
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        LANE=16 // first.weight.element_size(),
        num_warps=tiles.warps,
        num_stages=1,
        **chained(x.device),
        **OPTIONS,
    )
