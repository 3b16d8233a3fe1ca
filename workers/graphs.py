"""Steps that can be CUDA graphs (`headrace.workers.step_graphs`), for every size of step that is worth one.

A graph computes at fixed addresses. So what a step needs stands in tensors that stay: a few numbers per sequence or
token, which are copied there in one piece, and the tables of all rows' blocks, of which only what is new is written.
Everything that follows from these (slots, contexts, the rows' part of the tables) is computed inside the graph.

There are two kinds: decodes, where every sequence computes one token, and prompts, where sequences compute any number,
one included. A step is filled up to the next size with tokens that belong to nobody and write to a block of their own.
It ends with the choice of tokens, by the settings of each sequence; what is edited is chosen again outside.
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
from headrace.workers.device import upload
from headrace.workers.sampler import NUM_SETTINGS, Sampler, settings_in
from headrace.workers.scheduler import Chunk

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


def decode_sizes(num_rows: int) -> tuple[int, ...]:
    """Sequences of decodes that get a graph: few are wasted on filling up, and few graphs are needed."""
    return tuple(sorted({1, 2, 4, *range(8, num_rows, 8), num_rows} & set(range(1, num_rows + 1))))


def prompt_sizes(max_tokens: int) -> tuple[int, ...]:
    """Tokens of steps with prompts that get a graph."""
    sizes = tuple(size for size in _PROMPT_SIZES if size < max_tokens)
    return (*sizes, max_tokens) if max_tokens <= _PROMPT_SIZES[-1] else sizes


class DeviceTables:
    """Blocks of every row on the device.

    Attributes:
        device: [rows + 1, blocks] int32; the last row is of what fills a step up.
    """

    def __init__(self, num_rows: int, max_blocks: int, scratch_block: int, device: torch.device) -> None:
        self.device = torch.full((num_rows + 1, max_blocks), scratch_block, dtype=torch.int32, device=device)
        self._max_blocks = max_blocks
        self._news = BlockNews(num_rows)

    def show(self, rows: Items[tuple[int, list[int]]]) -> None:
        """Write what is new of the rows' blocks, all in one piece."""
        places: list[int] = []
        values: list[int] = []
        for row, blocks in rows:
            start, new_blocks = self._news.of(row, blocks)
            first = row * self._max_blocks + start
            places += range(first, first + len(new_blocks))
            values += new_blocks
        if places:
            new = upload(np.array((places, values)), self.device.device)
            self.device.view(-1).index_copy_(0, new[0], new[1].int())

    def slots(self, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
        """Where the tokens [T] of `rows` [T] at `positions` [T] are in the cache."""
        blocks = self.device.view(-1).index_select(0, rows * self._max_blocks + positions // block_size)
        return blocks * block_size + positions % block_size


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
        num_inputs: numbers that a step brings.

    Attributes:
        sizes: that steps are filled up to, ascending.
    """

    sizes: tuple[int, ...]

    def __init__(self, standing: Standing, num_inputs: int) -> None:
        self._standing = standing
        device = standing.sampler.last_tokens.device
        # The host's copy is there twice: the device may not have read that of the last step when the next is written.
        self._hosts = [torch.zeros(num_inputs, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(2)]
        self._inputs = torch.zeros(num_inputs, dtype=torch.int64, device=device)

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

    @abstractmethod
    def fill(self, chunks: Items[Chunk], size: int) -> None:
        """Write the inputs of a step, filled up to `size`."""

    @abstractmethod
    def compute(self, size: int) -> Computed:
        """Compute the inputs that were written; nothing in it depends on their values."""

    def _bring(self, chunks: Items[Chunk], host: np.ndarray) -> None:
        """Copy the inputs and what is new of the blocks to the device."""
        self._standing.tables.show([(chunk.sequence.row, chunk.sequence.blocks) for chunk in chunks])
        self._inputs[: len(host)].copy_(self._hosts[0][: len(host)], non_blocking=True)

    def _chosen(self, logits: Tensor, settings: Tensor, rows: Tensor) -> Computed:
        """The end of a step: tokens are chosen, and noted for the steps after it."""
        tokens = choose(logits, settings_in(settings))
        # -1, where logits were no numbers, is no token; what is computed after it is dropped.
        self._standing.sampler.last_tokens.index_copy_(0, rows, tokens.clamp(min=0))
        return Computed(logits, tokens)

    def _host(self) -> np.ndarray:
        """Where to write the inputs of the next step."""
        self._hosts.reverse()
        values: np.ndarray = self._hosts[0].numpy()
        return values


class StaticDecodes(StaticStep):
    """Steps in which every sequence computes one token and chooses the next; sizes count sequences."""

    def __init__(self, standing: Standing, sources: DeviceTables | None = None) -> None:
        num_rows = standing.num_rows
        super().__init__(standing, num_inputs=(4 + NUM_SETTINGS) * num_rows)
        self.sizes = decode_sizes(num_rows)
        self._sources = sources
        device = standing.sampler.last_tokens.device
        self._starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)

    def size_for(self, chunks: Items[Chunk]) -> int | None:
        """As `StaticStep.size_for`."""
        if not all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks):
            return None
        return self.size_of(len(chunks))

    def fill(self, chunks: Items[Chunk], size: int) -> None:
        """As `StaticStep.fill`."""
        # By sequence: token, position, row of the tables, tokens of its source; and how it is sampled.
        host = self._host()[: (4 + NUM_SETTINGS) * size].reshape(4 + NUM_SETTINGS, size)
        host[:] = 0
        host[2:4, len(chunks) :] = [[self._standing.num_rows], [1]]
        sequences = [chunk.sequence for chunk in chunks]
        host[:3, : len(chunks)] = [
            [next_input(sequence) for sequence in sequences],
            [sequence.num_computed for sequence in sequences],
            [sequence.row for sequence in sequences],
        ]
        if self._sources is not None:
            host[3, : len(chunks)] = [len(sequence.source) for sequence in sequences]
            self._sources.show([(sequence.row, sequence.source_blocks) for sequence in sequences])
        self._standing.sampler.write_settings(sequences, host[4:])
        self._bring(chunks, host.reshape(-1))

    def compute(self, size: int) -> Computed:
        """As `StaticStep.compute`."""
        inputs = self._inputs[: (4 + NUM_SETTINGS) * size].view(-1, size)
        tokens, positions, rows, sources = inputs[:4]
        standing = self._standing
        placed = place(
            tokens, positions, rows, standing.tables.device, standing.sampler.last_tokens, standing.kv.block_size
        )
        batch = Batch(
            token_ids=placed.token_ids,
            positions=positions,
            slots=placed.slots,
            query_starts=self._starts[: size + 1],
            context_lens=placed.context_lens,
            block_tables=placed.block_tables,
            num_decodes=size,
            query_lens=(1,) * size,
            context_lens_host=(self._standing.max_model_len,)
            * size,  # what a graph does must not depend on the present ones
            logits_rows=None,
            block_size=standing.kv.block_size,
        )
        if self._sources is not None:
            cross = dataclasses.replace(
                batch,
                context_lens=sources.int(),
                block_tables=self._sources.device.index_select(0, rows),
                _shared={},
            )
            batch = dataclasses.replace(batch, cross=cross)
        return self._chosen(standing.model(batch, standing.kv), inputs[4:], rows)


class StaticPrompts(StaticStep):
    """Steps of any sequences of a decoder, prompts among them; sizes count tokens."""

    def __init__(self, standing: Standing, max_tokens: int) -> None:
        self.sizes = prompt_sizes(max_tokens)
        super().__init__(standing, num_inputs=self._num_inputs(self.sizes[-1], standing.num_rows))

    @staticmethod
    def _num_inputs(size: int, num_rows: int) -> int:
        """Three by token, and three by sequence, one sequence more than there are rows; and by row where a chosen
        token goes and how it is chosen."""
        return 3 * size + 3 * (num_rows + 1) + 1 + (1 + NUM_SETTINGS) * num_rows

    def size_for(self, chunks: Items[Chunk]) -> int | None:
        """As `StaticStep.size_for`."""
        return self.size_of(sum(chunk.num_tokens for chunk in chunks))

    def fill(self, chunks: Items[Chunk], size: int) -> None:
        """As `StaticStep.fill`."""
        lens = [chunk.num_tokens for chunk in chunks]
        starts = [0, *accumulate(lens)]
        computed = [chunk.sequence.num_computed for chunk in chunks]
        rows = [chunk.sequence.row for chunk in chunks]
        used, num_rows, count = starts[-1], self._standing.num_rows, len(chunks)
        host = self._host()[: self._num_inputs(size, num_rows)]
        # By token: id, position, row of the tables.
        tokens = host[: 3 * size].reshape(3, size)
        chunk_tokens(chunks, tokens[0])
        tokens[1, :used] = np.arange(used) + np.repeat(np.array(computed, dtype=np.int64) - starts[:-1], lens)
        tokens[2, :used] = np.repeat(np.array(rows, dtype=np.int64), lens)
        tokens[:, used:] = [[0], [0], [num_rows]]
        tokens[1, used:] = np.arange(size - used) % self._standing.kv.block_size  # what they read they have written
        # By sequence, the last of which holds what fills the step up: where it begins, its context, its row.
        of_sequences, of_rows = np.split(host[3 * size :], [3 * (num_rows + 1) + 1])
        begins, contexts, owners = np.split(of_sequences, [num_rows + 2, 2 * num_rows + 3])
        begins[: count + 1], begins[count + 1 : -1], begins[-1] = starts, used, size
        contexts[:count], contexts[count:-1] = np.add(computed, lens), 0
        # No more than one block: tables may be shorter than a step. Tokens before that see nothing, and are nothing.
        contexts[-1] = min(size - used, self._standing.kv.block_size)
        owners[:count], owners[count:] = rows, num_rows
        # A token that is not wanted goes where it harms nobody.
        settings = of_rows.reshape(1 + NUM_SETTINGS, num_rows)
        settings[0], settings[1:] = num_rows, 0
        settings[0, :count] = [chunk.sequence.row if chunk.samples else num_rows for chunk in chunks]
        self._standing.sampler.write_settings([chunk.sequence for chunk in chunks], settings[1:])
        self._bring(chunks, host)

    def compute(self, size: int) -> Computed:
        """As `StaticStep.compute`."""
        num_rows = self._standing.num_rows
        count = num_rows + 1
        tokens, positions, row_of = self._inputs[: 3 * size].view(3, size)
        of_sequences = self._inputs[3 * size : 3 * size + 3 * count + 1]
        settings = self._inputs[3 * size + 3 * count + 1 : self._num_inputs(size, num_rows)].view(-1, num_rows)
        begins, contexts, owners = of_sequences.tensor_split((count + 1, 2 * count + 1))
        batch = Batch(
            token_ids=with_expected(tokens, self._standing.sampler.last_tokens, row_of),
            positions=positions,
            slots=self._standing.tables.slots(row_of, positions, self._standing.kv.block_size),
            query_starts=begins.int(),
            context_lens=contexts.int(),
            block_tables=self._standing.tables.device.index_select(0, owners),
            num_decodes=0,
            query_lens=(size,) * count,  # at most, as are the contexts
            context_lens_host=(self._standing.max_model_len,) * count,
            logits_rows=(begins[1:-1] - 1).clamp(min=0),
            block_size=self._standing.kv.block_size,
        )
        return self._chosen(self._standing.model(batch, self._standing.kv), settings[1:], settings[0])
