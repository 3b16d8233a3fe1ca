"""Gated activations of the feed-forward part."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from headrace.kernels.spec import Activation

__all__ = ["gated"]

_FUNCTIONS = {"silu": silu}


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, where `gate_up` [T, 2 * size] holds gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _FUNCTIONS[activation](gate).mul_(up)
