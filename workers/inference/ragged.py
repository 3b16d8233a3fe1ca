"""From a padded batch to one without padding, and its logits back to where their tokens were.

B rows, T columns, K of them with logits wanted; N tokens have theirs computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.workers.device import upload
from headrace.workers.inference.cache import BLOCK_SIZE, PagedCache

__all__ = ["Wanted", "kept_columns", "last_columns", "pack", "unpack"]


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
    tables = np.zeros((len(order), -(-int(ends.max()) // BLOCK_SIZE)), dtype=np.int32)
    for index, row in enumerate(order):
        tables[index, : len(cache.tables[row])] = cache.tables[row]
    slots = tables[np.repeat(np.arange(len(order)), lens), positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
    slots += positions % BLOCK_SIZE
    logits_rows, wanted = _wanted(real, columns, token_rows, token_columns)

    def tensor(values: np.ndarray) -> Tensor:
        return upload(values, input_ids.device)

    flat = input_ids.flatten()
    in_place = len(flat) == len(token_rows) and bool((order[:-1] < order[1:]).all())
    batch = Batch(
        token_ids=flat if in_place else flat[tensor(token_rows * input_ids.shape[1] + token_columns)],
        positions=tensor(positions),
        slots=tensor(slots),
        query_starts=tensor(starts.astype(np.int32)),
        context_lens=tensor(ends.astype(np.int32)),
        block_tables=tensor(tables),
        num_decodes=int((lens == 1).sum()),
        query_lens=tuple(lens.tolist()),
        context_lens_host=tuple(ends.tolist()),
        logits_rows=tensor(logits_rows),
        block_size=BLOCK_SIZE,
    )
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
