"""A projection as a module: its weight is filled in row by row, then packed for its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from headrace.kernels.norm import Norm
from headrace.kernels.ops.linear import fold_norm, linear, pack_weight
from headrace.kernels.ops.linears import Projection
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.quantize import NARROW, Scheme, store
from headrace.kernels.spec import Activation

__all__ = ["Linear", "are_plain"]

_OURS = __name__.rpartition(".")[0] + "."  # where all modules of a model are


class Linear(nn.Module):
    """x times weight [out, in], plus bias; with what comes before and after in the same pass, where there is a kernel.

    A gated one has two halves of rows: gate and up projection.

    Attributes:
        weight: [out, in].
        scale: [out], by which rows are multiplied, of one that is quantized.
        bias: [out].
    """

    scale: Tensor | None

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None
        self.register_buffer("scale", None)
        self._folded: Tensor | None = None
        self._own_factors = False  # whether they have a dtype that is not the model's

    def quantize(self, scheme: Scheme) -> None:
        """Be one whose weight is quantized, before it is filled in."""
        blank = self.weight
        self.weight = nn.Parameter(torch.empty_like(blank, dtype=scheme.dtype), requires_grad=False)
        self._own_factors = scheme.factors is not None
        self.scale = torch.empty(len(blank), dtype=scheme.factors or blank.dtype, device=blank.device)

    def forward(
        self,
        x: Tensor,
        *,
        before: NormWeights | None = None,
        activation: Activation | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The product [T, out] of x [T, in], see `headrace.kernels.ops.linear.linear`. The residual is lost."""
        return linear(
            x,
            self.weight,
            self.bias,
            scale=self.scale,
            before=before,
            folded=None if before is None else self._folded,
            activation=activation,
            gated=gated,
            residual=residual,
        )

    def projection(
        self, before: NormWeights | None = None, activation: Activation | None = None, *, gated: bool = False
    ) -> Projection:
        """What `forward` would compute with, for ops of several products."""
        folded = None if before is None else self._folded
        return Projection(self.weight, self.bias, self.scale, before, folded, activation, gated)

    def pack(self) -> None:
        """Bring the weight into the layout that its device multiplies fastest; nothing can be read from it then."""
        packed = pack_weight(self.weight)
        if packed is not self.weight:
            self.weight = nn.Parameter(packed, requires_grad=False)

    def fold(self, norm: Norm) -> None:
        """Let the only norm that ever comes before be part of the product, if that takes knowing the weight.

        What is packed belongs to a library, which has no such product.
        """
        if self.weight.is_mkldnn:
            return
        folded = fold_norm(self.weight, norm.weights, self.scale)
        if self._folded is None or folded is None or folded.device != self._folded.device:
            self._folded = folded
        else:
            with torch.inference_mode():
                self._folded.copy_(folded)  # there it stays: CUDA graphs read it

    def keeps(self, tensor: Tensor) -> bool:
        """Whether a weight or its factors are of their own dtype, whatever that of the model is."""
        return tensor.dtype in NARROW or (self._own_factors and tensor is self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Move or convert the weights; what is in 8 bits stays so, whatever the rest becomes (`module.half()`), and so
        do factors of a dtype of their own."""

        def converted(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype is tensor.dtype or not self.keeps(tensor):
                return changed
            return tensor.to(changed.device)

        return super()._apply(converted, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Quantize what others have kept as it was; copied into 8 bits it would lose all behind the point."""
        rows = state_dict.get(f"{prefix}weight")
        if self.scale is not None and isinstance(rows, Tensor) and rows.dtype not in NARROW and rows.ndim == 2:
            values = torch.empty_like(rows, dtype=self.weight.dtype, device=self.weight.device)
            scale = self.scale.new_empty(len(rows))
            store(rows, values, scale)
            state_dict = state_dict | {f"{prefix}weight": values, f"{prefix}scale": scale}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        out_size, in_size = self.weight.shape
        stored = "" if self.scale is None else f", {str(self.weight.dtype).removeprefix('torch.')}"
        return f"{in_size}, {out_size}, bias={self.bias is not None}{stored}"


def are_plain(*parts: nn.Module) -> bool:
    """Whether to call them is to compute what they stand for: they are ours, whatever an owner may put in their places,
    and nobody has hooked in."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return False
    ours = all(type(part).__module__.startswith(_OURS) for part in parts)
    hooked = any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)
    return ours and not hooked
