"""Where the cache of one batch lives, so that CUDA graphs can go on with its texts: a runner of the pool's engine, but
transformers' loop decides the steps.

Memory and graphs stay from call to call. A batch that comes when another is still there makes that one move out.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headrace.kernels.kv import KVCache
from headrace.messages import StreamId
from headrace.sampling import SamplingParams
from headrace.workers.inference.cache import BLOCK_SIZE, PagedCache
from headrace.workers.runner import Runner
from headrace.workers.sequence import Sequence

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["Home", "Size"]

_IN_FLIGHT = 2  # steps that may be on their way to the device: as many as there are places for their inputs


@dataclass(frozen=True, slots=True)
class Size:
    """What a batch may take up.

    Attributes:
        rows: texts.
        tokens: of the longest text, or source if one is longer.
        blocks: of all texts and sources.
    """

    rows: int
    tokens: int
    blocks: int

    @classmethod
    def of(cls, rows: int, tokens: int, source_tokens: int = 0) -> Size:
        """Of texts of a length about sources of another."""
        blocks = rows * (-(-tokens // BLOCK_SIZE) - (-source_tokens // BLOCK_SIZE))
        return cls(rows, max(tokens, source_tokens), blocks)

    def holds(self, other: Size) -> bool:
        """Whether the other fits."""
        return self.rows >= other.rows and self.tokens >= other.tokens and self.blocks >= other.blocks

    def with_room_for(self, other: Size) -> Size:
        """The smallest that holds both, one at a time."""
        return Size(max(self.rows, other.rows), max(self.tokens, other.tokens), max(self.blocks, other.blocks))


class Home:
    """A KV cache with the graphs of decode steps on it.

    Attributes:
        size: of the largest batch.
        kv: the cache, of blocks of 16 tokens.
        num_blocks: that batches may use.
        num_graphs: sizes of batches that have one.
    """

    def __init__(self, model: Model, size: Size) -> None:
        self.size = size
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
            self._runner = Runner(
                model,
                num_blocks=size.blocks,
                block_size=BLOCK_SIZE,
                max_num_seqs=size.rows,
                max_batch_tokens=size.rows,
                max_model_len=size.tokens,
            )
        self._sequences = [_sequence(row) for row in range(size.rows)]
        self._on_their_way: deque[torch.cuda.Event] = deque()

    @property
    def kv(self) -> KVCache:
        """The tensors."""
        return self._runner.kv

    @property
    def num_blocks(self) -> int:
        """Of the cache."""
        return self.size.blocks

    @property
    def num_graphs(self) -> int:
        """That were captured."""
        return self._runner.num_graphs

    def capture(self, rows: int) -> None:
        """Have a graph for batches of so many rows.

        Raises:
            RuntimeError: the model has something that cannot be captured, or there is no memory.
        """
        self._runner.capture_decodes(rows)

    def drop_graphs(self) -> None:
        """Free them."""
        self._runner.drop_graphs()

    def logits(self, cache: PagedCache, tokens: Tensor) -> Tensor | None:
        """Logits [rows, vocab] of the last token of each row, which has a place in the cache, but is not computed yet.

        Args:
            cache: which lives here.
            tokens: [rows] int64, those tokens.

        Returns:
            None if there is no graph for such a batch.
        """
        rows = len(cache.lens)
        if rows > self.size.rows or max((*cache.lens, *cache.source_lens)) > self.size.tokens:
            return None
        self._wait()
        for row in range(rows):
            self._place(self._sequences[row], cache, row)
        logits = self._runner.replay(self._sequences[:rows], tokens)
        if logits is None:
            return None
        if tokens.is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(tokens.device))
            self._on_their_way.append(arrived)
        return logits.clone()

    def _wait(self) -> None:
        """Until the device has read the inputs of the step whose place is needed."""
        if len(self._on_their_way) == _IN_FLIGHT:
            self._on_their_way.popleft().synchronize()

    def _place(self, sequence: Sequence, cache: PagedCache, row: int) -> None:
        """Let a sequence stand where a row does: before a token that only the device knows."""
        length = cache.lens[row]
        sequence.tokens = array("I", bytes(4 * length))
        sequence.num_computed = length - 1
        sequence.num_expected = 1
        sequence.blocks = cache.tables[row]
        if cache.source_lens:
            if len(sequence.source) != cache.source_lens[row]:
                sequence.source = array("I", bytes(4 * cache.source_lens[row]))
            sequence.source_blocks = cache.source_tables[row]


def _sequence(row: int) -> Sequence:
    """Of a row; how its tokens are chosen does not matter, as nobody reads the choice."""
    sequence = Sequence(StreamId(b"", 0, 0), array("I", [0]), SamplingParams(temperature=0.0), max_tokens=1)
    sequence.row = row
    return sequence
