"""The memory of keys and values: one tensor for all layers, cut into slots of one token. Who uses which slot is decided
elsewhere (`headrace.workers.blocks`)."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.spec import ModelSpec

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of `num_blocks` blocks, and two more. Memory is taken when first written.

    `scratch_block` belongs to nobody: what fills a batch up may write there. The last block is zero.

    A batch of contexts of different length is read as if all were as long as the longest; what is missing is read from
    the blank block. Masked values still enter sums as 0 * value, and there stale ones would do harm if they are NaN.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        attention = spec.layers[0].attention
        shape = (len(spec.layers), 2, (num_blocks + 2) * block_size, attention.num_kv_heads, attention.head_dim)
        self._tensor = torch.empty(shape, dtype=dtype, device=device)
        self._tensor[:, :, -block_size:] = 0
        self.block_size = block_size
        self.scratch_block = num_blocks

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [slots, kv heads, head dim]; the last slots are the blank block."""
        keys, values = self._tensor[index]
        return keys, values

    def clear(self) -> None:
        """Make zeros of all keys and values."""
        self._tensor.zero_()

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Memory that one block takes over all layers."""
        attention = spec.layers[0].attention
        return 2 * len(spec.layers) * block_size * attention.num_kv_heads * attention.head_dim * dtype.itemsize
