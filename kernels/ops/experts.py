"""Feed-forward parts of which each token asks a few, every answer weighted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.linear import linear
from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import MLPSpec

__all__ = ["experts"]


@pair
def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor | nn.ParameterList,
    down: Tensor | nn.ParameterList,
    spec: MLPSpec,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum of what each token's experts say to it, times their weights, and the residual; returns [T, hidden].

    Args:
        x: [T, hidden].
        chosen: [T, experts of a token] int64.
        weights: likewise, float32.
        up: [experts, size, hidden], gated [experts, 2 * size, hidden] with the gate first; or a packed weight of each.
        down: [experts, hidden, size]; or a packed weight of each.
        spec: size, activation and gate of every expert.
        residual: [T, hidden].
    """
    out = torch.zeros_like(x)
    for index in sorted(set(chosen.flatten().tolist())):
        rows, rank = (chosen == index).nonzero(as_tuple=True)
        inner = activate(linear(x[rows], up[index]), spec.activation, gated=spec.gated)
        out.index_add_(0, rows, (linear(inner, down[index]) * weights[rows, rank, None]).to(out.dtype))
    return out if residual is None else out.add_(residual)
