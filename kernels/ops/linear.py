"""Products with weight matrices, each kept in the layout that its device multiplies fastest, and all that is done to
their rows before and after: a norm, an activation, an addition."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops.activation import activate
from headrace.kernels.ops.dequantize import dequantize
from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.ops.pair import pair
from headrace.kernels.ops.rows import round_rows
from headrace.kernels.spec import Activation

__all__ = ["fold_norm", "linear", "pack_weight", "product", "rounds", "share_norm"]

_TYPICAL_ROWS = 8  # the layout that serves it is best from 1 to 512 rows (`headrace bench latency`)
_FOLDED_ROWS = 4096  # of a weight that are held in float32 at a time
_EXACT_ROWS = 64  # of which a product with their digits takes no longer than one without (H200)
_FP8_TILE = 16  # values in which products of fp8 are counted, in both directions
_FEW_ROWS = 32  # of which each costs as much as the first
_WHOLE = 32  # values; a product of bytes has vectors of 16 on some CPUs, and of 8 on others


@pair
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
    """activation(norm(x) @ weight.T * scale + bias) + residual, or as much of it as is asked for; returns [T, out].

    If `rounds` says so, rows are rounded to fp8 before they are multiplied.

    Args:
        x: [T, in].
        weight: [out, in], packed or plain; gated [2 * out, in], with the gate above the up projection.
        bias: [out], gated [2 * out].
        scale: likewise, of a weight that is quantized (`headrace.kernels.quantize`).
        before: the norm.
        folded: what `fold_norm` made of weight and norm. Kernels use it, and do without.
        activation: gated, of the gate, which is then multiplied with the up projection.
        gated: whether there is a gate.
        residual: [T, out]. It is lost: its memory may be that of the result.
    """
    if rounds(x, weight):
        rows, factors = round_rows(x, before)
        x = (rows.float() * factors).to(x.dtype)
    elif before is not None:
        x = norm(x, *before)
    out = product(x, weight, bias, scale)
    if activation is not None:
        out = activate(out, activation, gated=gated)
    return out if residual is None else out.add_(residual)


@pair
def share_norm(x: Tensor, before: NormWeights) -> tuple[Tensor, NormWeights | None]:
    """What several products that read the same norm of `x` [T, in] shall take as `x` and `before`.

    The norm is computed once, where `linear` would not get it for nothing.
    """
    return norm(x, *before), None


def rounds(x: Tensor, weight: Tensor) -> bool:
    """Whether rows `x` [T, in] are rounded to fp8 to be multiplied with a weight in fp8.

    If they are so many that tensor cores, which multiply their like, are what they need. Fewer wait for the weight, and
    keep their digits.
    """
    if weight.dtype is not torch.float8_e4m3fn or len(x) <= _EXACT_ROWS:
        return False
    return not (weight.shape[0] % _FP8_TILE or weight.shape[1] % _FP8_TILE)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x [T, in] times a packed, plain or quantized weight [out, in], plus the bias [out], as PyTorch computes it."""
    if scale is not None:
        if _multiplies_bytes(x, weight):
            few: Tensor = torch._weight_int8pack_mm(x, weight, scale)
            return few if bias is None else few.add_(bias)
        weight = dequantize(weight, scale, x.dtype)
    if weight.is_mkldnn:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return torch.nn.functional.linear(x, weight, bias)


def pack_weight(weight: Tensor) -> Tensor:
    """The weight [out, in] as `linear` wants it; the same tensor where there is nothing to gain.

    On a CPU that is oneDNN's blocked layout, with which small batches run at the speed of the memory: in bfloat16 1.5
    to 1.8 times, in float32 3 to 4 times as fast as from rows. A packed weight can only be multiplied with.
    """
    if weight.device.type != "cpu" or not _can_pack(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return packed


def fold_norm(weight: Tensor, before: NormWeights, scale_of_rows: Tensor | None = None) -> Tensor | None:
    """What a kernel must know of a weight [out, in] that is not packed to take a layer norm behind the product.

    The sums of its rows times the norm's scale, and times its shift, [2, out] float32; None if the norm needs none.
    """
    if before.spec.kind != "layer":
        return None
    size = weight.shape[1]
    scale = weight.new_ones(size) if before.weight is None else before.weight
    shift = weight.new_zeros(size) if before.bias is None else before.bias
    both = torch.stack((scale, shift)).float()
    folded = torch.cat([both @ rows.float().T for rows in torch.split(weight, _FOLDED_ROWS)], dim=1)
    return folded if scale_of_rows is None else folded * scale_of_rows.float()


def _multiplies_bytes(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch has a fast product with the weight as it is stored: of a few rows on a CPU.

    On two cores, with a weight of 8192 x 2048, one row took 0.7 ms and 16 took 3.8; to dequantize it first took 11 ms.
    """
    # PyTorch's product reads whole vectors: past the end of what they do not divide, whatever is there.
    fits = x.dtype is torch.bfloat16 and weight.dtype is torch.int8 and weight.shape[1] % _WHOLE == 0
    return fits and x.device.type == "cpu" and len(x) <= _FEW_ROWS and x.is_contiguous()


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32
