"""What a decode step needs, from where its sequences stand: tokens, slots, contexts and block tables."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.kernels.ops.pair import pair

__all__ = ["EXPECTED", "Placed", "place"]

EXPECTED = -1  # instead of a token that was chosen on the device, and is not known to the host yet


class Placed(NamedTuple):
    """The part of a batch that follows from its sequences' places; S sequences, B blocks of the longest."""

    token_ids: Tensor  # [S] int64
    slots: Tensor  # [S] int64
    context_lens: Tensor  # [S] int32
    block_tables: Tensor  # [S, B] int32


@pair
def place(
    tokens: Tensor, positions: Tensor, rows: Tensor, tables: Tensor, last_tokens: Tensor, block_size: int
) -> Placed:
    """Place the next token of each sequence.

    Args:
        tokens: [S] int64; where one is EXPECTED, that of its row in `last_tokens` takes its place.
        positions: [S] int64.
        rows: [S] int64, of `tables` and `last_tokens`.
        tables: [rows, B] int32, the blocks of each row.
        last_tokens: [rows] int64.
        block_size: tokens of a block.
    """
    blocks = tables[rows, positions // block_size].long()
    return Placed(
        token_ids=torch.where(tokens == EXPECTED, last_tokens[rows], tokens),
        slots=blocks * block_size + positions % block_size,
        context_lens=(positions + 1).int(),
        block_tables=tables[rows],
    )
