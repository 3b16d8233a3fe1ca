"""Arrays of several types and shapes in one piece of memory, so that one copy brings all of them to a device."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Layout", "Part"]

Part = tuple[type[np.generic] | np.dtype[Any], tuple[int, ...]]  # an array's type and its shape

_ALIGNED = 16  # bytes at whose multiples arrays begin: kernels are compiled for what begins there
_TYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


class Layout:
    """Where the arrays are.

    Args:
        parts: type, of 32 or 64 bits, and shape of each.

    Attributes:
        size: numbers of 64 bits that hold all of them.
    """

    def __init__(self, *parts: Part) -> None:
        self._parts = [(np.dtype(kind), shape) for kind, shape in parts]
        sizes = (-(-kind.itemsize * prod(shape) // _ALIGNED) * _ALIGNED for kind, shape in self._parts)
        *self._begins, end = accumulate(sizes, initial=0)
        self.size = end // 8

    def arrays(self, memory: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """The arrays in memory of the host, [at least `size`] int64."""
        return [
            np.ndarray(shape, kind, memory, begin)
            for (kind, shape), begin in zip(self._parts, self._begins, strict=True)
        ]

    def tensors(self, memory: Tensor) -> list[Tensor]:
        """The same in memory of a device, the whole of a tensor."""
        assert memory.storage_offset() == 0
        typed = {kind: memory.view(_TYPES[kind]) for kind in {kind for kind, _ in self._parts}}
        return [
            typed[kind].as_strided(shape, _strides(shape), begin // kind.itemsize)
            for (kind, shape), begin in zip(self._parts, self._begins, strict=True)
        ]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(shape[:0:-1], lambda have, size: have * size, initial=1))[::-1]
