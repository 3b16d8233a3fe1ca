"""Steps that can be CUDA graphs (`headrace.workers.step_graphs`), for every size of step that is worth one.

A graph computes at fixed addresses. So what a step needs stands in tensors that stay: a few numbers per sequence or
token, which are copied there in one piece, and the tables of all rows' blocks, of which only what is new is written.
Everything that follows from these (slots, contexts, the rows' part of the tables) is computed inside the graph.

There are two kinds: decodes, where every sequence computes one token, and prompts, where sequences compute any number,
one included. A step is filled up to the next size with tokens that belong to nobody and write to a block of their own.
It ends with the choice of tokens, by the settings of each sequence. Sequences that want their logits edited have theirs
chosen again, outside.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.kv import KVCache
from headrace.kernels.ops.placement import place
from headrace.kernels.ops.sampling import choose
from headrace.workers.batch import BlockNews, chunk_tokens, next_input, with_expected
from headrace.workers.device import Upload, upload_all
from headrace.workers.layout import Layout, Part
from headrace.workers.sampler import NUM_SETTINGS, Sampler, settings_in
from headrace.workers.scheduler import Chunk
from headrace.workers.sequence import Sequence

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = [
    "Computed",
    "DeviceTables",
    "Standing",
    "StaticDecodes",
    "StaticPrompts",
    "StaticStep",
    "decode_sizes",
    "prompt_sizes",
]

# Up to 256 tokens a step waits for the weights rather than for products, so what fills it up costs little; beyond, a
# size and a half keep that under a third. Larger steps are launched kernel by kernel, which took 8 to 13 ms for models
# of 16 to 24 layers on an H200's machine: large models compute longer than that meanwhile, small ones wait for it.
_PROMPT_SIZES = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)

_NEWS = 512  # blocks that a step tells of, in six kilobytes: few bring more, as when much of a prompt is found cached


def decode_sizes(num_rows: int) -> tuple[int, ...]:
    """Sequences of decodes that get a graph: few are wasted on filling up, and few graphs are needed."""
    return tuple(sorted({1, 2, 4, *range(8, num_rows, 8), num_rows} & set(range(1, num_rows + 1))))


def prompt_sizes(max_tokens: int) -> tuple[int, ...]:
    """Tokens of steps with prompts that get a graph."""
    sizes = tuple(size for size in _PROMPT_SIZES if size < max_tokens)
    return (*sizes, max_tokens) if max_tokens <= _PROMPT_SIZES[-1] else sizes


class DeviceTables:
    """Blocks of every row on the device.

    Args:
        num_rows: most sequences.
        max_blocks: most blocks of one sequence.
        scratch_block: where what fills a step up may write.
        device: where.
        sources: whether sequences have sources, too.

    Attributes:
        device: [rows + 1, blocks] int32; the last row is of what fills a step up.
        sources: likewise, of the blocks of their sources; None if there are none.
    """

    def __init__(
        self, num_rows: int, max_blocks: int, scratch_block: int, device: torch.device, *, sources: bool = False
    ) -> None:
        kinds = 1 + sources
        self._flat = torch.full((kinds * (num_rows + 1) * max_blocks,), scratch_block, dtype=torch.int32, device=device)
        self.device, *more = self._flat.view(kinds, num_rows + 1, max_blocks).unbind()
        self.sources = more[0] if more else None
        self._num_rows = num_rows
        self._max_blocks = max_blocks
        self._scratch_block = scratch_block
        self._news = BlockNews(kinds * (num_rows + 1))

    def write_news(self, sequences: Items[Sequence], places: np.ndarray, blocks: np.ndarray) -> None:
        """Write what is new of the blocks of sequences for `take`; what does not fit is brought to the device at once.

        Args:
            sequences: of the next step.
            places: [N] int64.
            blocks: [N] int32.
        """
        where: list[int] = []
        new: list[int] = []
        for sequence in sequences:
            self._add(sequence.row, sequence.blocks, where, new)
            if self.sources is not None:
                self._add(self._num_rows + 1 + sequence.row, sequence.source_blocks, where, new)
        if len(new) > len(places):
            self.take(*upload_all([np.array(where, dtype=np.int64), np.array(new, dtype=np.int32)], self._flat.device))
            where, new = [], []
        count = len(new)
        places[:count], places[count:] = where, self._num_rows * self._max_blocks
        blocks[:count], blocks[count:] = new, self._scratch_block  # as it is there anyway

    def take(self, places: Tensor, blocks: Tensor) -> None:
        """Let the tables have what `write_news` wrote."""
        self._flat.index_copy_(0, places, blocks)

    def slots(self, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
        """Where the tokens [T] of `rows` [T] at `positions` [T] are in the cache."""
        blocks = self._flat.index_select(0, rows * self._max_blocks + positions // block_size)
        return blocks * block_size + positions % block_size

    def _add(self, row: int, blocks: list[int], places: list[int], values: list[int]) -> None:
        start, new = self._news.of(row, blocks)
        if new:
            first = row * self._max_blocks + start
            places += range(first, first + len(new))
            values += new


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is the same for all steps.

    Attributes:
        model: a decoder, or an encoder-decoder.
        kv: its cache.
        tables: of the blocks of all rows.
        sampler: knows how sequences are sampled, and the tokens that they still expect.
        num_rows: most sequences of a step.
        max_model_len: most tokens of one sequence.
    """

    model: Model
    kv: KVCache
    tables: DeviceTables
    sampler: Sampler
    num_rows: int
    max_model_len: int


class Computed(NamedTuple):
    """What comes of a step; the first rows are those of its chunks, in their order. The next step overwrites it."""

    logits: Tensor  # [rows, vocab]
    tokens: Tensor  # [rows] int64, chosen by the settings alone; meaningless where a chunk does not sample


class StaticStep(ABC):
    """The inputs of a kind of step at fixed addresses, and the step itself.

    Args:
        standing: what is the same for all steps.
        sizes: that steps are filled up to, ascending.

    Attributes:
        sizes: likewise.
    """

    def __init__(self, standing: Standing, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self._standing = standing
        news: tuple[Part, Part] = (np.int64, (_NEWS,)), (np.int32, (_NEWS,))
        self._layouts = {size: Layout(*news, *self._parts(size)) for size in sizes}
        device = standing.sampler.last_tokens.device
        self._inputs = torch.zeros(self._layouts[sizes[-1]].size, dtype=torch.int64, device=device)
        self._upload = Upload(self._inputs)

    @property
    def rotary_tables(self) -> tuple[Tensor, ...]:
        """What the step reads besides weights, cache and inputs."""
        return self._standing.model.rotary_tables

    @abstractmethod
    def size_for(self, chunks: Items[Chunk]) -> int | None:
        """The size that a step is filled up to, or None if it is of another kind or too large."""

    def size_of(self, count: int) -> int | None:
        """The smallest size that holds so many, or None."""
        return next((size for size in self.sizes if size >= count), None)

    def fill(self, chunks: Items[Chunk], size: int) -> None:
        """Bring the inputs of a step, filled up to `size`, and what is new of the blocks to the device."""
        layout = self._layouts[size]
        places, blocks, *inputs = layout.arrays(self._upload.room(layout.size))
        self._standing.tables.write_news([chunk.sequence for chunk in chunks], places, blocks)
        self._write(chunks, *inputs)
        self._upload.send(layout.size)

    def compute(self, size: int) -> Computed:
        """Compute the inputs that were written; nothing in it depends on their values."""
        places, blocks, *inputs = self._layouts[size].tensors(self._inputs)
        self._standing.tables.take(places, blocks)
        return self._computed(*inputs)

    @abstractmethod
    def _parts(self, size: int) -> tuple[Part, ...]:
        """What a step of a size reads, besides news of blocks."""

    @abstractmethod
    def _write(self, chunks: Items[Chunk], *inputs: np.ndarray) -> None:
        """Write all of these parts."""

    @abstractmethod
    def _computed(self, *inputs: Tensor) -> Computed:
        """What comes of these parts."""

    def _chosen(self, logits: Tensor, settings: Tensor, rows: Tensor) -> Computed:
        """The end of a step: tokens are chosen, and noted for the steps after it."""
        tokens = choose(logits, settings_in(settings))
        # -1, where logits were no numbers, is no token; what is computed after it is dropped.
        self._standing.sampler.last_tokens.index_copy_(0, rows, tokens.clamp(min=0))
        return Computed(logits, tokens)


class StaticDecodes(StaticStep):
    """Steps in which every sequence computes one token and chooses the next; sizes count sequences."""

    def __init__(self, standing: Standing) -> None:
        super().__init__(standing, decode_sizes(standing.num_rows))
        device = standing.sampler.last_tokens.device
        self._starts = torch.arange(standing.num_rows + 1, dtype=torch.int32, device=device)

    def size_for(self, chunks: Items[Chunk]) -> int | None:
        """As `StaticStep.size_for`."""
        if not all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks):
            return None
        return self.size_of(len(chunks))

    def _parts(self, size: int) -> tuple[Part, ...]:
        # By sequence: token, position and row of the tables; how it is sampled; tokens of its source.
        return (np.int64, (3, size)), (np.int64, (NUM_SETTINGS, size)), (np.int32, (size,))

    def _write(self, chunks: Items[Chunk], *inputs: np.ndarray) -> None:
        places, settings, sources = inputs
        sequences = [chunk.sequence for chunk in chunks]
        count = len(sequences)
        places[:, :count] = [
            [next_input(sequence) for sequence in sequences],
            [sequence.num_computed for sequence in sequences],
            [sequence.row for sequence in sequences],
        ]
        places[:, count:] = [[0], [0], [self._standing.num_rows]]
        sources[:count], sources[count:] = [len(sequence.source) for sequence in sequences], 1
        settings[:] = 0
        self._standing.sampler.write_settings(sequences, settings)

    def _computed(self, *inputs: Tensor) -> Computed:
        (tokens, positions, rows), settings, sources = inputs
        standing, size = self._standing, len(tokens)
        tables, last_tokens = standing.tables, standing.sampler.last_tokens
        placed = place(tokens, positions, rows, tables.device, last_tokens, standing.kv.block_size)
        batch = Batch(
            token_ids=placed.token_ids,
            positions=positions,
            slots=placed.slots,
            query_starts=self._starts[: size + 1],
            context_lens=placed.context_lens,
            block_tables=placed.block_tables,
            num_decodes=size,
            query_lens=(1,) * size,
            context_lens_host=(standing.max_model_len,) * size,  # what a graph does must not depend on the present ones
            logits_rows=None,
            block_size=standing.kv.block_size,
        )
        if tables.sources is not None:
            blocks = tables.sources.index_select(0, rows)
            cross = dataclasses.replace(batch, context_lens=sources, block_tables=blocks, _shared={})
            batch = dataclasses.replace(batch, cross=cross)
        return self._chosen(standing.model(batch, standing.kv), settings, rows)


class StaticPrompts(StaticStep):
    """Steps of any sequences of a decoder, prompts among them; sizes count tokens."""

    def __init__(self, standing: Standing, max_tokens: int) -> None:
        super().__init__(standing, prompt_sizes(max_tokens))

    def size_for(self, chunks: Items[Chunk]) -> int | None:
        """As `StaticStep.size_for`."""
        return self.size_of(sum(chunk.num_tokens for chunk in chunks))

    def _parts(self, size: int) -> tuple[Part, ...]:
        num_rows = self._standing.num_rows
        return (
            # By token: id, position, row of the tables.
            (np.int64, (3, size)),
            # By sequence, and one more that fills the step up: where it begins, and where the last one ends; its
            # context; its row.
            (np.int32, (num_rows + 2,)),
            (np.int32, (num_rows + 1,)),
            (np.int64, (num_rows + 1,)),
            # By row: its last token; where the one that is chosen goes and how it is chosen.
            (np.int64, (num_rows,)),
            (np.int64, (1 + NUM_SETTINGS, num_rows)),
        )

    def _write(self, chunks: Items[Chunk], *inputs: np.ndarray) -> None:
        tokens, begins, contexts, owners, ends, settings = inputs
        sequences = [chunk.sequence for chunk in chunks]
        lens = [chunk.num_tokens for chunk in chunks]
        starts = [0, *accumulate(lens)]
        computed = [sequence.num_computed for sequence in sequences]
        rows = [sequence.row for sequence in sequences]
        used, num_rows, count = starts[-1], self._standing.num_rows, len(chunks)
        unused = tokens.shape[1] - used
        chunk_tokens(chunks, tokens[0])
        tokens[1, :used] = np.arange(used) + np.repeat(np.array(computed, dtype=np.int64) - starts[:-1], lens)
        tokens[2, :used] = np.repeat(np.array(rows, dtype=np.int64), lens)
        if unused:
            tokens[:, used:] = [[0], [0], [num_rows]]
            tokens[1, used:] = np.arange(unused) % self._standing.kv.block_size  # what they read they have written
        begins[: count + 1], begins[count + 1 : -1], begins[-1] = starts, used, used + unused
        contexts[:count], contexts[count:-1] = np.add(computed, lens), 0
        # No more than one block: tables may be shorter than a step. Tokens before that see nothing, and are nothing.
        contexts[-1] = min(unused, self._standing.kv.block_size)
        owners[:count], owners[count:] = rows, num_rows
        np.maximum(begins[1:-1] - 1, 0, out=ends)
        # A token that is not wanted goes where it harms nobody.
        settings[0], settings[1:] = num_rows, 0
        settings[0, :count] = [chunk.sequence.row if chunk.samples else num_rows for chunk in chunks]
        self._standing.sampler.write_settings(sequences, settings[1:])

    def _computed(self, *inputs: Tensor) -> Computed:
        (tokens, positions, row_of), begins, contexts, owners, ends, settings = inputs
        standing, count = self._standing, len(owners)
        batch = Batch(
            token_ids=with_expected(tokens, standing.sampler.last_tokens, row_of),
            positions=positions,
            slots=standing.tables.slots(row_of, positions, standing.kv.block_size),
            query_starts=begins,
            context_lens=contexts,
            block_tables=standing.tables.device.index_select(0, owners),
            num_decodes=0,
            query_lens=(len(tokens),) * count,  # at most, as are the contexts
            context_lens_host=(standing.max_model_len,) * count,
            logits_rows=ends,
            block_size=standing.kv.block_size,
        )
        return self._chosen(standing.model(batch, standing.kv), settings[1:], settings[0])
