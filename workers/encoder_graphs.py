"""Reading whole texts as CUDA graphs: one launch instead of hundreds, for every size of batch that is worth a graph.

The texts are those of an encoder, or the sources of an encoder-decoder, of which keys and values go to a cache. A graph
computes at fixed addresses and for a fixed number of tokens and texts. All that it reads of a batch is copied there in
one piece: where the texts begin and how long they are, the tokens, their positions and their slots. What is left up to
the graph's size is one more text, which belongs to nobody.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.workers.device import Upload, captured
from headrace.workers.layout import Layout

__all__ = ["RehearsedTexts", "StaticTexts", "TextGraphs", "size_for", "sizes_of_batches"]

# Tokens of a graph: a step of so many costs about as much as one of the next size, until it is bound by its products.
# Above the last, launches hide behind products in a model of billions of parameters. In BERT-large they do not yet with
# 4,096 tokens: on a slow host they took 24 ms, where a graph of 2,048 took 4.8.
_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_FEW_TEXTS = 8  # one text, few or many: each that is not there costs attention a program per head


def sizes_of_batches(max_tokens: int, max_texts: int) -> list[tuple[int, int]]:
    """Tokens and texts of the batches that get a graph, ascending; no text is empty."""
    tokens = [count for count in _TOKENS if count < max_tokens]
    tokens += [max_tokens] if max_tokens <= _TOKENS[-1] else []
    texts = sorted({1, min(_FEW_TEXTS, max_texts), max_texts})
    return [(count, most) for count, most in product(tokens, texts) if most <= count]


def size_for(sizes: Sequence[tuple[int, int]], num_tokens: int, num_texts: int) -> tuple[int, int] | None:
    """The smallest of ascending sizes that holds so many tokens and texts, if one does."""
    return next((size for size in sizes if size[0] >= num_tokens and size[1] >= num_texts), None)


class StaticTexts:
    """Texts at fixed addresses, and what is computed of them.

    Args:
        results: what is computed of a batch of whole texts.
        max_tokens: most tokens of a batch.
        max_texts: most texts of a batch.
        max_model_len: most tokens of one text.
        device: where.
        spare_slot: of the cache, if there is one, where what belongs to nobody may go.
        token_types: whether tokens have types other than the first.
    """

    def __init__(
        self,
        results: Callable[[Batch], tuple[Tensor, ...]],
        *,
        max_tokens: int,
        max_texts: int,
        max_model_len: int,
        device: torch.device,
        spare_slot: int = 0,
        token_types: bool = False,
    ) -> None:
        self._results = results
        self._max_model_len = max_model_len
        self._spare_slot = spare_slot
        self._inputs = torch.zeros(_layout((max_tokens, max_texts)).size, dtype=torch.int64, device=device)
        self._upload = Upload(self._inputs)
        self._block_tables = torch.zeros(max_texts + 1, 1, dtype=torch.int32, device=device)
        self._token_types = torch.zeros(max_tokens, dtype=torch.int64, device=device) if token_types else None

    def fill(
        self, texts: Sequence[array[int]], size: tuple[int, int], slots: np.ndarray[Any, Any] | None = None
    ) -> None:
        """Write texts, filled up to a size of tokens and texts, and the slots of their tokens, if they have some."""
        tokens, places = self._laid_out([len(text) for text in texts], size)
        end = 0
        for text in texts:
            tokens[end : end + len(text)] = np.frombuffer(text, np.uint32)
            end += len(text)
        if slots is not None:
            places[:end] = slots
        self._upload.send(_layout(size).size)

    def copy(self, batch: Batch, size: tuple[int, int]) -> None:
        """As `fill`, of texts whose tokens are on the device, and may have types."""
        self._laid_out(batch.query_lens, size)
        self._upload.send(_layout(size).size)
        used = len(batch.token_ids)
        _, _, tokens, _, _ = _layout(size).tensors(self._inputs)
        tokens[:used].copy_(batch.token_ids)
        if self._token_types is not None:
            self._token_types[:used] = 0 if batch.token_types is None else batch.token_types

    def _laid_out(self, text_lens: Sequence[int], size: tuple[int, int]) -> tuple[np.ndarray[Any, Any], ...]:
        """Where tokens and slots are to be written, [T] of each, all else being there: where texts of these lengths
        begin, and the positions of their tokens."""
        layout = _layout(size)
        values = self._upload.room(layout.size)
        values[:] = 0
        starts, lens, tokens, positions, places = layout.arrays(values)
        ends = list(accumulate(text_lens))
        for length, end in zip(text_lens, ends, strict=True):
            positions[end - length : end] = np.arange(length)
        used = ends[-1] if ends else 0
        places[used:] = self._spare_slot
        starts[1 : len(ends) + 1] = ends
        starts[len(ends) + 1 : -1] = used
        starts[-1] = size[0]
        lens[:] = np.diff(starts)
        return tokens, places

    def compute(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """What comes of what was written, and of what fills it up; nothing depends on the values."""
        starts, lens, tokens, positions, slots = _layout(size).tensors(self._inputs)
        num_tokens, num_texts = size
        nothing = tokens[:0]
        batch = Batch(
            token_ids=tokens,
            positions=positions,
            slots=slots,
            query_starts=starts,
            context_lens=lens,
            block_tables=self._block_tables[: num_texts + 1],
            num_decodes=0,
            query_lens=(num_tokens,) + (0,) * num_texts,  # of the present ones only the sum is known
            context_lens_host=(self._max_model_len,) * (num_texts + 1),
            logits_rows=nothing,
            block_size=1,
            token_types=None if self._token_types is None else self._token_types[:num_tokens],
        )
        return self._results(batch)


@cache
def _layout(size: tuple[int, int]) -> Layout:
    """Of what describes a batch: where each text begins, and where the last one ends; their lengths, one more than
    there may be; tokens, positions and slots."""
    num_tokens, num_texts = size
    of_token = (np.int64, (num_tokens,))
    return Layout((np.int32, (num_texts + 2,)), (np.int32, (num_texts + 1,)), of_token, of_token, of_token)


class TextGraphs:
    """A graph for each size of batch.

    Attributes:
        sizes: tokens and texts of those that have one, ascending.
        replays: batches computed by a graph.
    """

    def __init__(self, step: StaticTexts, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes
        self.replays = 0
        self._step = step
        self._pool: Any = None
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, pool: Any = None) -> None:
        """Capture all of them, the largest first: the others find room in its memory.

        Args:
            pool: of memory, of other graphs that never run at the same time; by default a new one.
        """
        self._pool = pool
        for size in reversed(self.sizes):
            self.capture_one(size)

    @torch.inference_mode()
    def capture_one(self, size: tuple[int, int]) -> None:
        """Capture that of a size, unless there is one."""
        if size in self._graphs:
            return
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._step.fill((), size)
        self._graphs[size] = captured(partial(self._step.compute, size), self._pool)

    def size_for(self, texts: Sequence[array[int]]) -> tuple[int, int] | None:
        """The smallest size that holds the texts, if one does."""
        return size_for(self.sizes, sum(map(len, texts)), len(texts))

    def run(
        self, texts: Sequence[array[int]], size: tuple[int, int], slots: np.ndarray[Any, Any] | None = None
    ) -> tuple[Tensor, ...]:
        """What is computed of texts, and of what fills them up; the next batch overwrites it.

        Args:
            texts: of at most the size.
            size: as `size_for` says.
            slots: [T] of their tokens, if keys and values of them go to a cache.
        """
        self._step.fill(texts, size, slots)
        self.replays += 1
        return self._computed(size)

    @torch.inference_mode()
    def run_batch(self, batch: Batch, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """As `run`, of texts whose tokens are on the device, and may have types."""
        self._step.copy(batch, size)
        self.replays += 1
        return self._computed(size)

    def _computed(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        graph, computed = self._graphs[size]
        graph.replay()
        return computed


class RehearsedTexts(TextGraphs):
    """As graphs, in a rehearsal: nothing is captured, so that a replay computes."""

    @torch.inference_mode()
    def capture(self, pool: Any = None) -> None:
        """Compute all of them once."""
        for size in self.sizes:
            self._step.fill((), size)
            self._step.compute(size)

    def _computed(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        return self._step.compute(size)
