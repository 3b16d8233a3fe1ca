"""Decode steps as CUDA graphs: one launch instead of hundreds, for every size of batch that is worth a graph.

A graph computes at fixed addresses. So what a step needs stands in tensors that stay: a few numbers per sequence, which
are copied there in one piece, and the tables of all rows' blocks, of which only what is new is written. Everything that
follows from these (slots, contexts, the rows' part of the tables) is computed inside the graph.

A batch is filled up to the next size with rows that belong to nobody; they write to a block of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.kv import KVCache
from headrace.workers.batch import BlockNews, next_input, with_expected
from headrace.workers.device import upload
from headrace.workers.scheduler import Chunk, Plan

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["DecodeGraphs", "StaticDecode", "sizes_up_to"]


def sizes_up_to(num_rows: int) -> list[int]:
    """Sizes of batches that get a graph: few are wasted on filling up, and few graphs are needed."""
    return sorted({1, 2, 4, *range(8, num_rows, 8), num_rows} & set(range(1, num_rows + 1)))


class StaticDecode:
    """The inputs of a decode step at fixed addresses, and the step itself.

    Args:
        model: a decoder, or an encoder-decoder.
        kv: its cache.
        num_rows: most sequences of a step.
        max_blocks: most blocks of one sequence.
        max_model_len: most tokens of one sequence.
        last_tokens: [rows + 1] int64: what stands for tokens that sequences still expect.
    """

    def __init__(
        self, model: Model, kv: KVCache, *, num_rows: int, max_blocks: int, max_model_len: int, last_tokens: Tensor
    ) -> None:
        self._model = model
        self._kv = kv
        self._num_rows = num_rows
        self._max_model_len = max_model_len
        self._last_tokens = last_tokens
        device = kv.layer(0)[0].device
        # By sequence: token, position, row of the tables, and tokens of its source. The host's copy is there twice:
        # the device may not have read that of the last step when the next one is written.
        self._hosts = [torch.zeros(4, num_rows, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(2)]
        self._inputs = torch.zeros(4, num_rows, dtype=torch.int64, device=device)
        self._tables = _Tables(num_rows, max_blocks, kv.scratch_block, device)
        has_sources = model.spec.encoder is not None
        self._sources = _Tables(num_rows, max_blocks, kv.scratch_block, device) if has_sources else None

    @property
    def rotary_tables(self) -> tuple[Tensor, ...]:
        """What the step reads besides weights, cache and inputs."""
        return self._model.rotary_tables

    def fill(self, chunks: Items[Chunk], size: int) -> None:
        """Write the inputs of a step, filled up to `size` sequences."""
        self._hosts.reverse()
        host = self._hosts[0].numpy()
        host[:, :size] = 0
        host[2, :size] = self._num_rows
        host[3, :size] = 1
        sequences = [chunk.sequence for chunk in chunks]
        host[:3, : len(chunks)] = [
            [next_input(sequence) for sequence in sequences],
            [sequence.num_computed for sequence in sequences],
            [sequence.row for sequence in sequences],
        ]
        if self._sources is not None:
            host[3, : len(chunks)] = [len(sequence.source) for sequence in sequences]
            self._sources.show([(sequence.row, sequence.source_blocks) for sequence in sequences])
        self._tables.show([(sequence.row, sequence.blocks) for sequence in sequences])
        self._inputs.copy_(self._hosts[0], non_blocking=True)

    def compute(self, size: int) -> Tensor:
        """Logits [size, vocab] of the inputs that were written; nothing in it depends on their values."""
        tokens, positions, rows, sources = self._inputs[:, :size]
        block_size = self._kv.block_size
        tables = self._tables.device.index_select(0, rows)
        blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
        batch = Batch(
            token_ids=with_expected(tokens, self._last_tokens, rows),
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=tokens.device),
            context_lens=(positions + 1).int(),
            block_tables=tables,
            num_decodes=size,
            query_lens=(1,) * size,
            context_lens_host=(self._max_model_len,) * size,  # what a graph does must not depend on the present ones
            logits_rows=torch.arange(size, device=tokens.device),
            block_size=block_size,
        )
        if self._sources is not None:
            cross = dataclasses.replace(
                batch,
                context_lens=sources.int(),
                block_tables=self._sources.device.index_select(0, rows),
                _shared={},
            )
            batch = dataclasses.replace(batch, cross=cross)
        logits: Tensor = self._model(batch, self._kv)
        return logits


class DecodeGraphs:
    """A graph for each size of batch.

    Attributes:
        sizes: that have one, ascending.
        replays: steps computed by a graph.
    """

    def __init__(self, step: StaticDecode, num_rows: int) -> None:
        self.sizes = sizes_up_to(num_rows)
        self.replays = 0
        self._step = step
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._read: tuple[Tensor, ...] = ()

    @torch.inference_mode()
    def capture(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture all of them, the largest first: the others find room in its memory."""
        step, pool = self._step, torch.cuda.graph_pool_handle()
        self._read = step.rotary_tables  # should the model ever have larger ones, graphs go on reading these
        for done, size in enumerate(reversed(self.sizes)):
            step.fill((), size)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step.compute(size)  # compiles, and lets libraries set themselves up
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = step.compute(size)
            self._graphs[size] = graph, logits
            told(done + 1, len(self.sizes))

    def takes(self, plan: Plan) -> bool:
        """Whether there is a graph for a plan: every sequence computes one token and samples the next."""
        chunks = plan.chunks
        return 0 < len(chunks) <= self.sizes[-1] and all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks)

    def run(self, chunks: Items[Chunk]) -> Tensor:
        """Logits [sequences, vocab]; the next step overwrites them."""
        size = next(size for size in self.sizes if size >= len(chunks))
        self._step.fill(chunks, size)
        graph, logits = self._graphs[size]
        graph.replay()
        self.replays += 1
        return logits[: len(chunks)]


class _Tables:
    """Blocks of every row on the device, [rows + 1, blocks] int32; the last row is of those that fill a batch up."""

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
