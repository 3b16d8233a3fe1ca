"""A projection as a module: its weight is filled in row by row, then packed for its device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from headrace.kernels.norm import Norm
from headrace.kernels.ops.linear import fold_norm, linear
from headrace.kernels.ops.linears import Projection
from headrace.kernels.ops.norm import NormWeights
from headrace.kernels.spec import Activation
from headrace.kernels.weight import Weight

__all__ = ["Linear", "are_plain"]

_OURS = __name__.rpartition(".")[0] + "."  # where all modules of a model are


class Linear(Weight):
    """x times weight [out, in], plus bias; with what comes before and after in the same pass, where there is a kernel.

    A gated one has two halves of rows: gate and up projection.

    Attributes:
        bias: [out].
    """

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__(out_size, in_size)
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None
        self._folded: Tensor | None = None

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

    def extra_repr(self) -> str:
        """For `print(model)`."""
        out_size, in_size = self.weight.shape
        return f"{in_size}, {out_size}, bias={self.bias is not None}{self.stored}"


def are_plain(*parts: nn.Module) -> bool:
    """Whether to call them is to compute what they stand for: they are ours, whatever an owner may put in their places,
    and nobody has hooked in."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return False
    ours = all(type(part).__module__.startswith(_OURS) for part in parts)
    hooked = any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)
    return ours and not hooked
