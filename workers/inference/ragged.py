"""From a padded batch to one without padding, and its logits or states back to where their tokens were.

B rows, T columns, K of them with logits wanted; N tokens have theirs computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.workers.batch import whole_texts
from headrace.workers.device import upload
from headrace.workers.inference.cache import BLOCK_SIZE, PagedCache

__all__ = ["Texts", "Wanted", "kept_columns", "last_columns", "pack", "pack_texts", "source_slots", "unpack"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose logits are wanted.

    Attributes:
        rows: [N] of the padded batch.
        places: [N] among the K wanted columns.
        shape: B and K.
        all_in_order: every one is, row after row, so that nothing has to be moved.
    """

    rows: np.ndarray
    places: np.ndarray
    shape: tuple[int, int]
    all_in_order: bool


def kept_columns(num_columns: int, logits_to_keep: int | Tensor) -> np.ndarray:
    """The columns that transformers means: the last so many, 0 for all, or those named; each once, ascending."""
    columns = np.arange(num_columns)
    if isinstance(logits_to_keep, Tensor):
        return np.unique(columns[logits_to_keep.cpu().numpy()])
    return columns[-logits_to_keep:]


def last_columns(real: np.ndarray) -> np.ndarray:
    """The last real column of each row, [B, 1]."""
    columns: np.ndarray = real.shape[1] - 1 - real[:, ::-1].argmax(1)[:, None]
    return columns


def pack(input_ids: Tensor, real: np.ndarray, columns: np.ndarray, cache: PagedCache) -> tuple[Batch, Wanted]:
    """The real tokens of a padded batch side by side, behind what the cache holds of their rows.

    Args:
        input_ids: [B, T].
        real: [B, T] bool, at least one; the cache was extended by it.
        columns: [K] or [B, K], where logits are wanted.
        cache: of these rows.
    """
    counts = real.sum(1)
    # Rows with a single token come first, as a Batch wants them; those without any take no part.
    order = np.concatenate((np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)))
    lens, ends = counts[order], np.array(cache.lens)[order]
    starts = np.concatenate(([0], np.cumsum(lens)))
    token_rows = np.repeat(order, lens)
    token_columns = np.concatenate([np.flatnonzero(real[row]) for row in order])
    positions = np.arange(starts[-1]) + np.repeat(ends - lens - starts[:-1], lens)
    tables = _stacked([cache.tables[row] for row in order])
    logits_rows, wanted = _wanted(real, columns, token_rows, token_columns)

    def tensor(values: np.ndarray) -> Tensor:
        return upload(values, input_ids.device)

    flat = input_ids.flatten()
    in_place = len(flat) == len(token_rows) and bool((order[:-1] < order[1:]).all())
    batch = Batch(
        token_ids=flat if in_place else flat[tensor(token_rows * input_ids.shape[1] + token_columns)],
        positions=tensor(positions),
        slots=tensor(_slots(tables, np.repeat(np.arange(len(order)), lens), positions)),
        query_starts=tensor(starts.astype(np.int32)),
        context_lens=tensor(ends.astype(np.int32)),
        block_tables=tensor(tables),
        num_decodes=int((lens == 1).sum()),
        query_lens=tuple(lens.tolist()),
        context_lens_host=tuple(ends.tolist()),
        logits_rows=None if np.array_equal(logits_rows, np.arange(len(token_rows))) else tensor(logits_rows),
        block_size=BLOCK_SIZE,
    )
    if cache.source_lens:
        source_lens = tuple(cache.source_lens[row] for row in order)
        cross = dataclasses.replace(
            batch,
            context_lens=tensor(np.array(source_lens, dtype=np.int32)),
            block_tables=tensor(_stacked([cache.source_tables[row] for row in order])),
            context_lens_host=source_lens,
            _shared={},
        )
        batch = dataclasses.replace(batch, cross=cross)
    return batch, wanted


def unpack(logits: Tensor, wanted: Wanted) -> Tensor:
    """Logits [N, vocab] at their places in [B, K, vocab]; zero where there is padding."""
    if wanted.all_in_order:
        return logits.view(*wanted.shape, -1)
    padded = logits.new_zeros(*wanted.shape, logits.shape[-1])
    device = logits.device
    padded[upload(wanted.rows, device), upload(wanted.places, device)] = logits
    return padded


def _wanted(
    real: np.ndarray, columns: np.ndarray, token_rows: np.ndarray, token_columns: np.ndarray
) -> tuple[np.ndarray, Wanted]:
    """The packed tokens whose logits are wanted, [N], and where these go."""
    index_of = np.full(real.shape, -1)
    index_of[token_rows, token_columns] = np.arange(len(token_rows))
    columns = np.broadcast_to(columns, (len(real), columns.shape[-1]))
    packed = np.take_along_axis(index_of, columns, axis=1)
    rows, places = np.nonzero(packed >= 0)
    indexes = packed[rows, places]
    in_order = len(indexes) == packed.size and bool((indexes[:-1] < indexes[1:]).all())
    order = np.argsort(indexes)  # ascending, so that all of them are just the model's output
    return indexes[order], Wanted(rows[order], places[order], packed.shape, in_order)


@dataclass(frozen=True, slots=True)
class Texts:
    """Whole texts of a padded batch, side by side.

    Attributes:
        batch: of R texts; rows without a token are none of them.
        rows: [R] of the padded batch.
        real: [rows, columns] bool, which tokens of the padded batch they are.
        places: [T], where these are in the padded batch, as if that were one row; None if there is no padding.
    """

    batch: Batch
    rows: Tensor
    real: np.ndarray
    places: Tensor | None

    def padded(self, values: Tensor) -> Tensor:
        """Values [T, size] of tokens at their places in [rows, columns, size]; zero where there is padding."""
        rows, columns = self.real.shape
        if self.places is None:
            return values.view(rows, columns, -1)
        padded = values.new_zeros(rows * columns, values.shape[-1])
        padded[self.places] = values
        return padded.view(rows, columns, -1)

    def firsts(self, values: Tensor) -> Tensor:
        """Of values [T, size] of tokens, those of the first tokens of all texts, [R, size]."""
        return values[self.batch.query_starts[:-1].long()]

    def per_row(self, values: Tensor) -> Tensor:
        """Values [R, size] of texts at their rows, [rows, size]; zero where there is none."""
        padded = values.new_zeros(len(self.real), values.shape[-1])
        padded[self.rows] = values
        return padded


def pack_texts(input_ids: Tensor, real: np.ndarray, token_types: Tensor | None = None) -> Texts:
    """The texts of a padded batch, to be read as a whole: nothing is cached.

    Args:
        input_ids: [B, T].
        real: [B, T] bool, at least one.
        token_types: [B, T], if there are any.
    """
    counts = real.sum(1)
    rows = np.flatnonzero(counts)
    device = input_ids.device
    places = None if real.all() else upload(np.flatnonzero(real), device)

    def packed(values: Tensor) -> Tensor:
        return values.flatten() if places is None else values.flatten()[places]

    types = None if token_types is None else packed(token_types)
    batch = whole_texts(packed(input_ids), counts[rows].tolist(), types)
    return Texts(batch, upload(rows, device), real, places)


def source_slots(cache: PagedCache) -> np.ndarray:
    """Where the sources of a cache are, [T], one row after the other."""
    lens = np.array(cache.source_lens)
    positions = np.concatenate([np.arange(length) for length in lens])
    return _slots(_stacked(cache.source_tables), np.repeat(np.arange(len(lens)), lens), positions)


def _stacked(tables: Sequence[list[int]]) -> np.ndarray:
    """Tables of blocks as one array, [rows, most blocks]; zero behind the shorter ones."""
    stacked = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(stacked, tables, strict=True):
        row[: len(table)] = table
    return stacked


def _slots(tables: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The slots [T] of tokens, told by the row of their table and their position in its text."""
    slots: np.ndarray = tables[rows, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
    slots += positions % BLOCK_SIZE
    return slots
