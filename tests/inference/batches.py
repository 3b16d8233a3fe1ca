"""Padded batches of random tokens, and what engines make of several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

__all__ = ["generated_at_once", "padded", "positions_of"]


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


def generated_at_once(
    engine: Any, batches: Sequence[tuple[Tensor, Tensor]], times: int, settings: dict[str, Any]
) -> list[list[Tensor]]:
    """What `generate` returned each time for each batch, which has a thread of its own."""

    def use(batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [engine.generate(*batch, **settings) for _ in range(times)]

    with ThreadPoolExecutor(len(batches)) as pool:
        return list(pool.map(use, batches))
