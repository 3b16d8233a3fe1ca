"""Feed-forward parts of which each token asks a few, every answer weighted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.linear import product
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
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum of what each token's experts say to it, times their weights, and the residual; returns [T, hidden].

    Of experts that are quantized, rows keep their digits, however many they are.

    Args:
        x: [T, hidden].
        chosen: [T, experts of a token] int64.
        weights: likewise, float32.
        up: [experts, size, hidden], gated [experts, 2 * size, hidden] with the gate first; or a packed weight of each.
        down: [experts, hidden, size]; or a packed weight of each.
        spec: size, activation and gate of every expert.
        up_scale: [experts, size], gated [experts, 2 * size], if they are quantized (`headrace.kernels.quantize`).
        down_scale: [experts, hidden], likewise.
        residual: [T, hidden].
    """
    out = torch.zeros_like(x)
    for index in sorted(set(chosen.flatten().tolist())):
        rows, rank = (chosen == index).nonzero(as_tuple=True)
        inner = _product(x[rows], up, up_scale, index)
        inner = activate(inner, spec.activation, gated=spec.gated)
        said = _product(inner, down, down_scale, index) * weights[rows, rank, None]
        out.index_add_(0, rows, said.to(out.dtype))
    return out if residual is None else out.add_(residual)


def _product(x: Tensor, matrices: Tensor | nn.ParameterList, scale: Tensor | None, index: int) -> Tensor:
    return product(x, matrices[index], scale=None if scale is None else scale[index])
