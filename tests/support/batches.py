"""Batches over a scattered cache, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.kernels.batch import Batch

__all__ = ["make_batch"]


def make_batch(
    lens: Sequence[tuple[int, int]],
    *,
    block_size: int = 4,
    num_blocks: int = 64,
    token_ids: Sequence[int] | None = None,
    all_logits: bool = False,
    rows: Sequence[int] | None = None,
    token_types: torch.Tensor | None = None,
) -> Batch:
    """Sequences of (queries, context); past a context the block table points to the last block, which is somebody's.

    Each of `rows` (by default the first ones), which are up to eight, or more if one is named, has blocks of its own,
    shuffled over the cache, the same in every call, so that later calls continue the sequences of earlier ones.
    """
    rows = range(len(lens)) if rows is None else rows
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    share = num_blocks // max(8, 1 + max(rows))
    longest = max(-(-context // block_size) for _, context in lens)
    tables = torch.full((len(lens), longest), num_blocks - 1, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for index, (row, (queries, context)) in enumerate(zip(rows, lens, strict=True)):
        blocks = order[row * share : row * share + -(-context // block_size)]
        assert -(-context // block_size) <= share, "a row has no more blocks than its share"
        tables[index, : len(blocks)] = torch.tensor(blocks)
        for position in range(context - queries, context):
            positions.append(position)
            slots.append(blocks[position // block_size] * block_size + position % block_size)
        starts.append(starts[-1] + queries)
    ends = [stop - 1 for stop in starts[1:]]
    return Batch(
        token_ids=torch.tensor(token_ids if token_ids is not None else [0] * len(positions)),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in lens], dtype=torch.int32),
        block_tables=tables,
        num_decodes=sum(queries == 1 for queries, _ in lens),
        query_lens=tuple(queries for queries, _ in lens),
        context_lens_host=tuple(context for _, context in lens),
        logits_rows=torch.tensor(list(range(len(positions))) if all_logits else ends),
        block_size=block_size,
        token_types=token_types,
    )
