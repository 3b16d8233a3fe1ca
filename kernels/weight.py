"""The matrix of a projection, or a stack of them: plain, quantized, or packed for its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from headrace.kernels.ops.linear import pack_weight
from headrace.kernels.quantize import NARROW, Scheme, store

__all__ = ["Stack", "Weight"]


class Weight(nn.Module):
    """Rows that are filled in one after the other.

    Attributes:
        weight: [out, in], or [matrices, out, in].
        scale: [out], or [matrices, out], by which rows are multiplied, of one that is quantized.
    """

    scale: Tensor | None

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_buffer("scale", None)
        self._own_factors = False  # whether they have a dtype that is not the model's

    def quantize(self, scheme: Scheme) -> None:
        """Be one that is quantized, before it is filled in."""
        blank = self.weight
        self.weight = nn.Parameter(torch.empty_like(blank, dtype=scheme.dtype), requires_grad=False)
        self._own_factors = scheme.factors is not None
        self.scale = torch.empty(blank.shape[:-1], dtype=scheme.factors or blank.dtype, device=blank.device)

    def pack(self) -> None:
        """Bring it into the layout that its device multiplies fastest; nothing can be read from it then."""
        packed = pack_weight(self.weight)
        if packed is not self.weight:
            self.weight = nn.Parameter(packed, requires_grad=False)

    @property
    def stored(self) -> str:
        """What `print(model)` adds: in what it is quantized, if it is."""
        return "" if self.scale is None else f", {str(self.weight.dtype).removeprefix('torch.')}"

    def keeps(self, tensor: Tensor) -> bool:
        """Whether the weight or its factors are of their own dtype, whatever that of the model is."""
        return tensor.dtype in NARROW or (self._own_factors and tensor is self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert it; what is in 8 bits stays so, whatever the rest becomes (`module.half()`), and so do
        factors of a dtype of their own."""

        def converted(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype is tensor.dtype or not self.keeps(tensor):
                return changed
            return tensor.to(changed.device)

        return super()._apply(converted, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Quantize what others have kept as it was; copied into 8 bits it would lose all behind the point."""
        rows = state_dict.get(f"{prefix}weight")
        if (
            self.scale is not None
            and isinstance(rows, Tensor)
            and rows.dtype not in NARROW
            and rows.ndim == self.weight.ndim
        ):
            values = torch.empty(rows.shape, dtype=self.weight.dtype, device=self.weight.device)
            scale = self.scale.new_empty(rows.shape[:-1])
            store(rows.flatten(0, -2), values.flatten(0, -2), scale.flatten())
            state_dict = state_dict | {f"{prefix}weight": values, f"{prefix}scale": scale}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Stack(Weight):
    """Matrices of one shape, each multiplied with rows of its own."""

    def __init__(self, count: int, out_size: int, in_size: int) -> None:
        super().__init__(count, out_size, in_size)
        self.packed: nn.ParameterList | None = None

    @property
    def matrices(self) -> Tensor | nn.ParameterList:
        """[matrices, out, in], or a packed one of each."""
        return self.weight if self.packed is None else self.packed

    def pack(self) -> None:
        """Bring each matrix into the layout that its device multiplies fastest."""
        if self.packed is None:
            packed = [pack_weight(matrix) for matrix in self.weight]
            if any(matrix.is_mkldnn for matrix in packed):
                self.packed = nn.ParameterList([nn.Parameter(matrix, requires_grad=False) for matrix in packed])
                del self.weight

    def extra_repr(self) -> str:
        """For `print(model)`."""
        if self.packed is not None:
            return ""
        count, out_size, in_size = self.weight.shape
        return f"{count} of {in_size}, {out_size}{self.stored}"
