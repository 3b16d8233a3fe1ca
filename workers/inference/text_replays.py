"""Whole texts read by CUDA graphs: one for each size of batch, made when a batch first needs it, kept for the next.

What is made of the states of tokens (logits, a pooler, the head of a task) is computed as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.model import Model
from headrace.workers.encoder_graphs import StaticTexts, TextGraphs, size_for, sizes_of_batches
from headrace.workers.inference.road import Road

__all__ = ["TextReplays"]

_MOST_TOKENS = 2048  # of a batch: the most that a graph is made for
_MOST_TEXTS = 256


class TextReplays:
    """Graphs of batches; these may come from several threads.

    Args:
        model: that reads, or whose encoder does.
        states: gives the states [T, hidden] of a batch of whole texts.
        max_tokens: of one text.
        road: says whether there may be graphs.

    Attributes:
        num_replays: batches computed by a graph.
    """

    def __init__(self, model: Model, states: Callable[[Batch], Tensor], *, max_tokens: int, road: Road) -> None:
        self.num_replays = 0
        self.road = road
        self._model = model
        self._states = states
        self._max_tokens = max_tokens
        self._sizes = sizes_of_batches(_MOST_TOKENS, _MOST_TEXTS)
        self._lock = threading.Lock()
        self._graphs: TextGraphs | None = None
        self._done: torch.cuda.Event | None = None  # with the last batch

    @property
    def num_graphs(self) -> int:
        """Sizes of batches that have one."""
        return 0 if self._graphs is None else len(self._graphs)

    def states(self, batch: Batch) -> Tensor:
        """The states [T, hidden] of the tokens of whole texts.

        Raises:
            ConfigError: there can be no graph, but graphs were insisted on.
        """
        with self._lock:
            if self.road.moved():
                self._graphs = None
            size = size_for(self._sizes, len(batch.token_ids), len(batch.query_lens))
            if self.road.open() and size is not None:
                with self._in_turn(batch.token_ids):
                    if self.road.try_to(lambda: self._prepare(size)):
                        return self._replayed(batch, size)
        return self._states(batch)

    def close(self) -> None:
        """Free the graphs."""
        with self._lock:
            self._graphs = None

    @contextmanager
    def _in_turn(self, token_ids: Tensor) -> Iterator[None]:
        """Within, what is launched comes behind the last batch, also if that came from another stream: both are copied
        to the same place."""
        if not token_ids.is_cuda:
            yield
            return
        stream = torch.cuda.current_stream(token_ids.device)
        if self._done is not None:
            stream.wait_event(self._done)
        yield
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record(stream)

    def _prepare(self, size: tuple[int, int]) -> None:
        """Have a graph for batches of a size."""
        if self._graphs is None:
            self._graphs = self._new_graphs()
        self._graphs.capture_one(size)

    def _new_graphs(self) -> TextGraphs:
        device = self._model.embedding.weight.device
        assert isinstance(device, torch.device)
        self._model.reserve_positions(self._max_tokens)
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
            step = StaticTexts(
                lambda batch: (self._states(batch),),
                max_tokens=_MOST_TOKENS,
                max_texts=_MOST_TEXTS,
                max_model_len=self._max_tokens,
                device=device,
                token_types=self._model.spec.embedding.token_types > 0,
            )
        return TextGraphs(step, self._sizes)

    def _replayed(self, batch: Batch, size: tuple[int, int]) -> Tensor:
        assert self._graphs is not None
        (states,) = self._graphs.run_batch(batch, size)
        self.num_replays += 1
        return states[: len(batch.token_ids)].clone()
