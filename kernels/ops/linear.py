"""Products with weight matrices, each kept in the layout that its device multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear", "pack_weight"]

_TYPICAL_ROWS = 8  # the layout that serves it is best from 1 to 512 rows (`headrace bench latency`)


def pack_weight(weight: Tensor) -> Tensor:
    """The weight [out, in] as `linear` wants it; the same tensor where there is nothing to gain.

    On a CPU that is oneDNN's blocked layout, with which small batches run at the speed of the memory: in bfloat16 1.5
    to 1.8 times, in float32 3 to 4 times as fast as from rows. A packed weight can only be multiplied with.
    """
    if weight.device.type != "cpu" or not _can_pack(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times a packed or plain weight [out, in], plus the bias [out]."""
    if weight.is_mkldnn:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return torch.nn.functional.linear(x, weight, bias)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32
