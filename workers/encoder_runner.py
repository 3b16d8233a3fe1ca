"""Computes whole texts on an encoder: vectors for those that want one, likely tokens for the masks of the others.

It owns what has a device and decides nothing about who runs, nor when results are read. T tokens in all, S texts, N
masks. Of each text the device makes both vectors that may be asked for; what is left to do to the few that are, the
host does when it reads them (`headrace.workers.encoder_results`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.pooling import pool
from headrace.kernels.tuning import MOST_ROWS
from headrace.workers.batch import read_texts
from headrace.workers.device import upload
from headrace.workers.encoder_graphs import RehearsedTexts, StaticTexts, TextGraphs, sizes_of_batches
from headrace.workers.encoder_results import Results, Text
from headrace.workers.parallel_compile import compile_ahead
from headrace.workers.rehearsal import rehearsing

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["EncoderRunner"]

logger = logging.getLogger(__name__)

_POOLED = ("mean", "cls")  # in the order in which `pool` makes them


class EncoderRunner:
    """The model, and `launch` for at most `max_texts` texts of `max_model_len` tokens each, `max_tokens` together."""

    def __init__(self, model: Model, *, max_tokens: int, max_texts: int, max_model_len: int) -> None:
        self._model = model
        self._device = model.embedding.weight.device
        assert isinstance(self._device, torch.device)
        self._max_tokens = max_tokens
        self._max_texts = max_texts
        self._max_model_len = max_model_len
        self._graphs: TextGraphs | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether steps can become graphs: only on a GPU."""
        return self._device.type == "cuda"

    @property
    def num_graphs(self) -> int:
        """Sizes of steps that have one."""
        return 0 if self._graphs is None else len(self._graphs)

    @property
    def num_replays(self) -> int:
        """Steps computed by a graph."""
        return 0 if self._graphs is None else self._graphs.replays

    def capture(self) -> None:
        """Make graphs of steps of all sizes; call it when nothing runs. Without room for them there are none."""
        try:
            graphs = self._new_graphs(TextGraphs)
            graphs.capture()
            self._graphs = graphs
        except torch.OutOfMemoryError as error:
            logger.warning(
                "There is no memory for CUDA graphs (%s); steps are computed without them, which is slower. Lower "
                "--max-num-seqs, or leave more of the GPU to this model.",
                str(error).partition("\n")[0],
            )

    def compile_ahead(self, compute: Callable[[], None]) -> int:
        """Compile with many threads what a function launches by this runner, before it is called for its results; the
        number of kernels."""
        with rehearsing(self._model):
            return compile_ahead(compute, self._device)

    def rehearse_capture(self) -> None:
        """Do as `capture`, in a rehearsal."""
        with suppress(torch.OutOfMemoryError):
            self._new_graphs(RehearsedTexts).capture()

    def _new_graphs(self, kind: type[TextGraphs]) -> TextGraphs:
        self._model.reserve_positions(self._max_model_len)
        step = StaticTexts(
            self._computed,
            max_tokens=self._max_tokens,
            max_texts=self._max_texts,
            max_model_len=self._max_model_len,
            device=self._device,
        )
        return kind(step, sizes_of_batches(self._max_tokens, self._max_texts))

    @torch.inference_mode()
    def launch(self, texts: Sequence[Text]) -> Results:
        """Start to compute texts together; nothing waits for the device until the results are read."""
        hidden, pooled = self._states(texts)
        wanted = {text.pooling.pooling for text in texts if text.pooling is not None}
        vectors = {name: pooled[kind, : len(texts)] for kind, name in enumerate(_POOLED) if name in wanted}
        return Results(texts, vectors, self._likeliest(texts, hidden))

    def _states(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Hidden states of texts, [T, hidden] or more, and what `pool` made of them, [2, S, hidden] or more."""
        tokens = [text.tokens for text in texts]
        if self._graphs is not None and (size := self._graphs.size_for(tokens)) is not None:
            hidden, pooled = self._graphs.run(tokens, size)
            return hidden, pooled
        return self._computed(read_texts(tokens, self._device))

    def _computed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = self._model.hidden(batch, None)
        return hidden, pool(hidden, batch.query_starts)

    def _likeliest(self, texts: Sequence[Text], hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Log probabilities and ids [N, likeliest] for the masks that are to be filled, as many as the text that wants
        most; None without masks."""
        wanted = [index for index, text in enumerate(texts) if text.pooling is None]
        starts = [0, *accumulate(len(text.tokens) for text in texts)]
        rows = [starts[index] + place for index in wanted for place in texts[index].masks]
        if not rows:
            return None
        top = min(max(texts[index].top or 1 for index in wanted), self._model.spec.vocab_size)
        # In pieces: all tokens of a step may be masks, and their logits would take more than all else in it together.
        parts = [
            self._model.logits(those).float().log_softmax(-1).topk(top)
            for those in torch.split(hidden[upload(np.array(rows), self._device)], MOST_ROWS)
        ]
        values, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
        return values, tokens
