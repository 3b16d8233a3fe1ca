"""The kernel of `activate`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.math_triton import OPTIONS, sigmoid, tanh
from headrace.kernels.spec import Activation

__all__ = ["activate"]

# Eight values for each thread of four warps: one 16-byte load of a 16-bit type, and parts enough to fill a GPU even
# when there is one row.
_BLOCK = 1024
_WARPS = 4


def activate(x: Tensor, activation: Activation, *, gated: bool) -> Tensor:
    """As `headrace.kernels.ops.activation.activate`."""
    size = x.shape[-1] // 2 if gated else x.shape[-1]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(size))
    if len(rows):
        grid = (len(rows), triton.cdiv(size, block))
        settings = {"SIZE": size, "BLOCK": block, "num_warps": _WARPS, **chained(x.device), **OPTIONS}
        _activate[grid](rows, out, ACTIVATION=activation, GATED=gated, **settings)
    return out


@triton.jit
def _activate(
    x,
    out,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    let_next_begin(CHAINED)
    wait_for_earlier(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = columns < SIZE
    start = x + row * (2 * SIZE if GATED else SIZE)
    value = tl.load(start + columns, mask=held, other=0.0).to(tl.float32)
    value = activated(value, ACTIVATION)
    if GATED:
        value *= tl.load(start + SIZE + columns, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, value.to(out.dtype.element_ty), mask=held)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """The activation of a float32."""
    if ACTIVATION == "silu":
        value *= sigmoid(value)
    elif ACTIVATION == "relu":
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays NaN
    elif ACTIVATION == "gelu":
        value *= 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        value *= 0.5 * (1.0 + tanh(0.7978845608028654 * (value + 0.044715 * value * value * value)))
    return value
