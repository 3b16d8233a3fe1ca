"""Padded batches of random tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["padded", "positions_of"]


def padded(
    lens: list[int], *, side: str = "left", seed: int = 1, spare: int = 0, vocab: int = 250
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts of these lengths; `spare` more columns are padding in every row."""
    columns = max(lens) + spare
    ids = torch.randint(0, vocab, (len(lens), columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(lens), columns, dtype=torch.long)
    for row, length in enumerate(lens):
        if side == "left":
            mask[row, columns - length :] = 1
        else:
            mask[row, :length] = 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Each real token counts one."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
