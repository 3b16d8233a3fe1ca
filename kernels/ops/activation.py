"""Activations of the feed-forward part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from headrace.kernels.ops.pair import pair
from headrace.kernels.spec import Activation

__all__ = ["activate"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": _gelu_tanh,
}


@pair
def activate(x: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """activation(x), or gated activation(gate) * up, where `x` [T, 2 * size] holds gate first."""
    function = _FUNCTIONS[activation]
    if not gated:
        return function(x)
    gate, up = x.chunk(2, dim=-1)
    return function(gate).mul_(up)
