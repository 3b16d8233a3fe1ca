"""From a plan to the tensors of one step: token ids, positions, KV slots and block tables of a ragged batch.

Each running sequence has a row in one persistent table of blocks, where only new blocks are written; the rest is
arithmetic on whole arrays, so the cost hardly grows with the number of tokens.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence as Items
from itertools import accumulate

import numpy as np
import torch

from headrace.kernels.batch import Batch
from headrace.kernels.ops.placement import EXPECTED
from headrace.workers.device import Parcel, upload_all
from headrace.workers.layout import Part
from headrace.workers.scheduler import Chunk
from headrace.workers.sequence import Sequence

__all__ = ["BatchBuilder", "BlockNews", "chunk_tokens", "next_input", "read_texts", "whole_texts", "with_expected"]


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
        lens = [chunk.num_tokens for chunk in chunks]
        contexts = tuple(chunk.sequence.num_computed + length for chunk, length in zip(chunks, lens, strict=True))
        sources = tuple(len(chunk.sequence.source) for chunk in chunks)
        num_decodes = sum(length == 1 for length in lens)
        assert all(length == 1 for length in lens[:num_decodes]), "decodes come first"

        token_ids, positions, slots, logits_rows, starts, context_lens, table, rows, *cross = self._brought(
            chunks, lens, contexts, sources
        )
        batch = Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=starts,
            context_lens=context_lens,
            block_tables=table,
            num_decodes=num_decodes,
            query_lens=tuple(lens),
            context_lens_host=contexts,
            logits_rows=None if len(logits_rows) == len(token_ids) else logits_rows,
            block_size=self._block_size,
        )
        if any(chunk.sequence.num_expected for chunk in chunks[:num_decodes]):
            decodes = token_ids[:num_decodes]
            decodes.copy_(with_expected(decodes, self._last_tokens, rows[:num_decodes]))
        if not cross:
            return batch
        lens_of_sources, source_table = cross
        of_sources = dataclasses.replace(
            batch, context_lens=lens_of_sources, block_tables=source_table, context_lens_host=sources, _shared={}
        )
        return dataclasses.replace(batch, cross=of_sources)

    def _brought(
        self, chunks: Items[Chunk], lens: list[int], contexts: Items[int], sources: Items[int]
    ) -> list[torch.Tensor]:
        """What the device is to know of a batch: token ids, positions and slots; tokens whose logits are wanted; where
        sequences begin, their contexts, tables and rows; and if they have some, lengths and tables of their sources."""
        for sequence, _ in chunks:
            self._tables.show(sequence.row, sequence.blocks)
        starts = [0, *accumulate(lens)]
        logits_rows = [start - 1 for chunk, start in zip(chunks, starts[1:], strict=True) if chunk.samples]
        rows = np.array([chunk.sequence.row for chunk in chunks])
        small: list[np.ndarray] = [
            np.array(logits_rows, dtype=np.int64),
            np.array(starts, dtype=np.int32),
            np.array(contexts, dtype=np.int32),
            self._table(self._tables, rows, contexts),
            rows,
        ]
        if sources[0]:
            small += [np.array(sources, dtype=np.int32), self._table(self._source_tables, rows, sources)]
        # Those of tokens are written in place: there may be thousands.
        of_tokens: list[Part] = [(np.int64, (starts[-1],))] * 3
        parcel = Parcel(self._device, *of_tokens, *((part.dtype, part.shape) for part in small))
        token_ids, positions, slots, *places = parcel.arrays
        chunk_tokens(chunks, token_ids)
        positions[:] = np.arange(starts[-1])
        positions += np.repeat(np.array(contexts) - starts[1:], lens)
        slots[:] = self._slots(self._tables, rows, lens, positions)
        for place, part in zip(places, small, strict=True):
            place[...] = part
        return parcel.send()

    def place_sources(self, sequences: Items[Sequence]) -> np.ndarray:
        """Slots [T] of the tokens of whole sources, side by side; from now on `build` knows where they are."""
        for sequence in sequences:
            self._source_tables.show(sequence.row, sequence.source_blocks)
        lens = [len(sequence.source) for sequence in sequences]
        rows = np.array([sequence.row for sequence in sequences])
        positions = np.concatenate([np.arange(length) for length in lens])
        return self._slots(self._source_tables, rows, lens, positions)

    def build_sources(self, sequences: Items[Sequence]) -> Batch:
        """The batch that an encoder reads: whole sources, side by side."""
        slots = self.place_sources(sequences)
        lens = tuple(len(sequence.source) for sequence in sequences)
        rows = np.array([sequence.row for sequence in sequences])
        table = self._table(self._source_tables, rows, lens)
        batch, (places, block_tables) = _brought_texts([one.source for one in sequences], self._device, slots, table)
        return dataclasses.replace(batch, slots=places, block_tables=block_tables, block_size=self._block_size)

    def _slots(self, tables: _Tables, rows: np.ndarray, lens: Items[int], positions: np.ndarray) -> np.ndarray:
        """Of tokens at `positions` [T], `lens` of each of `rows` side by side."""
        # Of the thousands of tokens of a prompt, remainders and two indexes would take three times as long.
        indexes = positions // self._block_size
        places = np.repeat(rows * tables.blocks.shape[1], lens)
        places += indexes
        slots: np.ndarray = tables.blocks.reshape(-1).take(places).astype(np.int64)
        slots -= indexes
        slots *= self._block_size
        slots += positions
        return slots

    def _table(self, tables: _Tables, rows: np.ndarray, contexts: Items[int]) -> np.ndarray:
        return tables.blocks[rows, : -(-max(contexts) // self._block_size)]


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
    return _texts(token_ids, lens, upload_all(_text_parts(lens), token_ids.device), token_types)


def read_texts(texts: Items[array[int]], device: torch.device) -> Batch:
    """As `whole_texts`, of texts that the host has."""
    return _brought_texts(texts, device)[0]


def _brought_texts(
    texts: Items[array[int]], device: torch.device, *more: np.ndarray
) -> tuple[Batch, list[torch.Tensor]]:
    """The batch of texts that the host has, and more arrays, brought to a device together."""
    lens = [len(text) for text in texts]
    token_ids = np.concatenate([np.frombuffer(text, np.uint32) for text in texts]).astype(np.int64)
    parts = _text_parts(lens)
    ids, *tensors = upload_all([token_ids, *parts, *more], device)
    return _texts(ids, lens, tensors[: len(parts)]), tensors[len(parts) :]


def _text_parts(lens: Items[int]) -> list[np.ndarray]:
    """Positions of whole texts' tokens, where the texts begin, their lengths, and tables of no block."""
    starts = np.array([0, *accumulate(lens)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lens)
    table = np.zeros((len(lens), 1), dtype=np.int32)
    return [positions, starts.astype(np.int32), np.array(lens, dtype=np.int32), table]


def _texts(
    token_ids: torch.Tensor, lens: Items[int], parts: list[torch.Tensor], token_types: torch.Tensor | None = None
) -> Batch:
    positions, starts, context_lens, table = parts
    nothing = torch.empty(0, dtype=torch.int64, device=token_ids.device)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slots=nothing,
        query_starts=starts,
        context_lens=context_lens,
        block_tables=table,
        num_decodes=0,
        query_lens=tuple(lens),
        context_lens_host=tuple(lens),
        logits_rows=nothing,
        block_size=1,
        token_types=token_types,
    )
