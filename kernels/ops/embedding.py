"""What a token is to the first block: its row of a table, with that of its position and that of its segment added."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from headrace.kernels.ops.pair import pair

__all__ = ["embed"]


@pair
def embed(
    token_ids: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
    segments: Tensor | None = None,
    segment_table: Tensor | None = None,
) -> Tensor:
    """tokens[token_ids] * scale + position_table[positions + offset] + segment_table[segments], as far as given: [T, d]

    A kernel computes in float32, and makes NaN of rows that are not there, where the reference raises IndexError.

    Args:
        token_ids: [T] int64.
        tokens: [vocab, d].
        scale: of the tokens' rows alone.
        positions: [T] int64.
        position_table: [rows, d]; None adds nothing.
        offset: row of the first position.
        segments: [T] int64; None means that all tokens are of the first one.
        segment_table: [segments, d]; None adds nothing.
    """
    x = embedding(token_ids, tokens)
    if scale != 1.0:
        x = x * scale
    if position_table is not None:
        assert positions is not None
        x = x + embedding(positions + offset, position_table)
    if segment_table is not None:
        x = x + embedding(torch.zeros_like(token_ids) if segments is None else segments, segment_table)
    return x
