"""From a plan to the tensors of one step: token ids, positions, KV slots and block tables of a ragged batch.

Each running sequence has a row in one persistent table of blocks, where only new blocks are written; the rest is
arithmetic on whole arrays, so the cost hardly grows with the number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Items
from itertools import accumulate

import numpy as np
import torch

from headrace.kernels.batch import Batch
from headrace.kernels.ops.placement import EXPECTED
from headrace.workers.device import upload
from headrace.workers.scheduler import Chunk
from headrace.workers.sequence import Sequence

__all__ = ["BatchBuilder", "BlockNews", "chunk_tokens", "next_input", "whole_texts", "with_expected"]


class BatchBuilder:
    """The block tables of all rows, and `build`.

    Args:
        num_rows: most sequences that run at once.
        max_blocks: most blocks of one sequence.
        block_size: tokens of a block.
        last_tokens: [rows + 1] int64, on the model's device: what stands for tokens that sequences still expect.
    """

    def __init__(self, *, num_rows: int, max_blocks: int, block_size: int, last_tokens: torch.Tensor) -> None:
        self._block_size = block_size
        self._last_tokens = last_tokens
        self._device = last_tokens.device
        self._tables = _Tables(num_rows, max_blocks)
        self._source_tables = _Tables(num_rows, max_blocks)

    def build(self, chunks: Items[Chunk]) -> Batch:
        """The batch of a plan's chunks; call it before the next plan changes the sequences."""
        for sequence, _ in chunks:
            self._tables.show(sequence.row, sequence.blocks)
        lens = [chunk.num_tokens for chunk in chunks]
        computed = [chunk.sequence.num_computed for chunk in chunks]
        contexts = tuple(have + new for have, new in zip(computed, lens, strict=True))
        starts = [0, *accumulate(lens)]
        num_decodes = sum(length == 1 for length in lens)
        assert all(length == 1 for length in lens[:num_decodes]), "decodes come first"

        rows = np.array([chunk.sequence.row for chunk in chunks])
        token_ids = np.empty(starts[-1], dtype=np.int64)
        chunk_tokens(chunks, token_ids)
        if num_decodes == len(chunks):
            positions, row_of = np.array(computed), rows
        else:
            shift = np.array(computed) - np.array(starts[:-1])
            positions, row_of = np.arange(starts[-1]) + np.repeat(shift, lens), np.repeat(rows, lens)
        logits_rows = [start - 1 for chunk, start in zip(chunks, starts[1:], strict=True) if chunk.samples]
        all_sample = len(logits_rows) == starts[-1]
        batch = Batch(
            token_ids=self._token_ids(token_ids, rows[:num_decodes]),
            positions=self._tensor(positions),
            slots=self._tensor(self._slots(self._tables, row_of, positions)),
            query_starts=self._tensor(np.array(starts, dtype=np.int32)),
            context_lens=self._tensor(np.array(contexts, dtype=np.int32)),
            block_tables=self._table(self._tables, rows, contexts),
            num_decodes=num_decodes,
            query_lens=tuple(lens),
            context_lens_host=contexts,
            logits_rows=None if all_sample else self._tensor(np.array(logits_rows, dtype=np.int64)),
            block_size=self._block_size,
        )
        if not chunks[0].sequence.source:
            return batch
        sources = tuple(len(chunk.sequence.source) for chunk in chunks)
        cross = dataclasses.replace(
            batch,
            context_lens=self._tensor(np.array(sources, dtype=np.int32)),
            block_tables=self._table(self._source_tables, rows, sources),
            context_lens_host=sources,
            _shared={},
        )
        return dataclasses.replace(batch, cross=cross)

    def place_sources(self, sequences: Items[Sequence]) -> np.ndarray:
        """Slots [T] of the tokens of whole sources, side by side; from now on `build` knows where they are."""
        for sequence in sequences:
            self._source_tables.show(sequence.row, sequence.source_blocks)
        lens = [len(sequence.source) for sequence in sequences]
        rows = np.array([sequence.row for sequence in sequences])
        positions = np.concatenate([np.arange(length) for length in lens])
        return self._slots(self._source_tables, np.repeat(rows, lens), positions)

    def build_sources(self, sequences: Items[Sequence]) -> Batch:
        """The batch that an encoder reads: whole sources, side by side."""
        slots = self.place_sources(sequences)
        lens = tuple(len(sequence.source) for sequence in sequences)
        rows = np.array([sequence.row for sequence in sequences])
        token_ids = np.concatenate([np.frombuffer(sequence.source, np.uint32) for sequence in sequences])
        return dataclasses.replace(
            whole_texts(self._tensor(token_ids.astype(np.int64)), lens),
            slots=self._tensor(slots),
            block_tables=self._table(self._source_tables, rows, lens),
            block_size=self._block_size,
        )

    def _token_ids(self, token_ids: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """On the device, where those of the decodes, which come first, may be EXPECTED."""
        ids = self._tensor(token_ids)
        if (token_ids[: len(rows)] == EXPECTED).any():
            ids[: len(rows)] = with_expected(ids[: len(rows)], self._last_tokens, self._tensor(rows))
        return ids

    def _slots(self, tables: _Tables, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        # Of the thousands of tokens of a prompt, remainders and two indexes would take three times as long.
        indexes = positions // self._block_size
        places = rows * tables.blocks.shape[1] + indexes
        slots: np.ndarray = tables.blocks.reshape(-1).take(places).astype(np.int64)
        slots -= indexes
        slots *= self._block_size
        slots += positions
        return slots

    def _table(self, tables: _Tables, rows: np.ndarray, contexts: Items[int]) -> torch.Tensor:
        return self._tensor(tables.blocks[rows, : -(-max(contexts) // self._block_size)])

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return upload(values, self._device)


def next_input(sequence: Sequence) -> int:
    """The token that a decode computes, or EXPECTED if only the device knows it."""
    return EXPECTED if sequence.num_expected else sequence.tokens[sequence.num_computed]


def chunk_tokens(chunks: Items[Chunk], into: np.ndarray) -> None:
    """Write the tokens that a step computes side by side; of decodes, which come first, they may be EXPECTED."""
    start = 0
    for sequence, count in chunks:
        if count == 1:
            into[start] = next_input(sequence)
        else:
            first = sequence.num_computed * sequence.tokens.itemsize
            into[start : start + count] = np.frombuffer(sequence.tokens, np.uint32, count, first)
        start += count


def with_expected(token_ids: torch.Tensor, last_tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Token ids [n] of decodes in `rows` [n], the expected ones filled in."""
    return torch.where(token_ids == EXPECTED, last_tokens.index_select(0, rows), token_ids)


class _Tables:
    """One table of blocks per row; `blocks` is [rows, blocks] int32."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self.blocks = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self._news = BlockNews(num_rows)

    def show(self, row: int, blocks: list[int]) -> None:
        """Write what is new of a sequence's blocks."""
        start, new = self._news.of(row, blocks)
        if new:
            self.blocks[row, start : start + len(new)] = new


class BlockNews:
    """What of the rows' blocks has not been written to a table yet."""

    def __init__(self, num_rows: int) -> None:
        # The list object whose blocks a row shows: a sequence gets a new list whenever it is admitted.
        self._shown: list[list[int] | None] = [None] * num_rows
        self._written = [0] * num_rows

    def of(self, row: int, blocks: list[int]) -> tuple[int, list[int]]:
        """Where the new blocks of a row begin, and these, which count as written from now on."""
        if self._shown[row] is not blocks:
            self._shown[row] = blocks
            self._written[row] = 0
        start = self._written[row]
        self._written[row] = len(blocks)
        return start, blocks[start:]


def whole_texts(token_ids: torch.Tensor, lens: Items[int], token_types: torch.Tensor | None = None) -> Batch:
    """The batch of whole texts side by side, for a model that reads them in both directions: nothing is cached.

    Args:
        token_ids: [T] int64, on the model's device.
        lens: tokens of each text, at least one.
        token_types: [T] int64, if there are any.
    """
    device = token_ids.device
    starts = np.array([0, *accumulate(lens)])
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return Batch(
        token_ids=token_ids,
        positions=upload(np.arange(starts[-1]) - np.repeat(starts[:-1], lens), device),
        slots=nothing,
        query_starts=upload(starts.astype(np.int32), device),
        context_lens=upload(np.array(lens, dtype=np.int32), device),
        block_tables=upload(np.zeros((len(lens), 1), dtype=np.int32), device),
        num_decodes=0,
        query_lens=tuple(lens),
        context_lens_host=tuple(lens),
        logits_rows=nothing,
        block_size=1,
        token_types=token_types,
    )
