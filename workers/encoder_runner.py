"""Computes whole texts on an encoder: vectors for those that want one, likely tokens for the masks of the others.

It owns what has a device and decides nothing about who runs. T tokens in all, S texts, N masks. Of each text the device
makes both vectors that may be asked for; what is left to do to the few that are, the host does.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.kernels.ops.pooling import pool
from headrace.messages import pack_tokens
from headrace.tasks import PoolingParams
from headrace.workers.batch import read_texts
from headrace.workers.device import Download, upload
from headrace.workers.encoder_graphs import RehearsedTexts, StaticTexts, TextGraphs, sizes_of_batches
from headrace.workers.parallel_compile import compile_ahead
from headrace.workers.rehearsal import rehearsing

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["EncoderRunner", "Items", "Text"]

logger = logging.getLogger(__name__)

_POOLED = ("mean", "cls")  # in the order in which `pool` makes them
_SHORTEST = 1e-12  # by which a vector is divided: PyTorch's


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What is computed of one text.

    Attributes:
        tokens: of the text.
        pooling: how its vector is made; None if its masks are to be filled.
        masks: places of the mask tokens.
        top: how many likely tokens to tell for each mask; None for the likeliest without its probability.
    """

    tokens: array[int]
    pooling: PoolingParams | None = None
    masks: tuple[int, ...] = ()
    top: int | None = None


@dataclass(frozen=True, slots=True)
class Items:
    """What came of one text: items of 32 bits, and for masks their log probabilities as in a TokenRun."""

    packed: bytes
    logprobs: list[Any] | None = None


class EncoderRunner:
    """The model, and `run` for at most `max_texts` texts of `max_model_len` tokens each, `max_tokens` together."""

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
    def run(self, texts: Sequence[Text]) -> list[Items | None]:
        """Compute texts together; None for one whose results are not numbers."""
        hidden, pooled = self._states(texts)
        results: list[Items | None] = [None] * len(texts)
        self._embed(texts, pooled, results)
        self._fill(texts, hidden, results)
        return results

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

    def _embed(self, texts: Sequence[Text], pooled: Tensor, results: list[Items | None]) -> None:
        by_params: dict[PoolingParams, list[int]] = {}
        for index, text in enumerate(texts):
            if text.pooling is not None:
                by_params.setdefault(text.pooling, []).append(index)
        kinds = sorted({_POOLED.index(params.pooling) for params in by_params})
        if not kinds:
            return
        coming = Download(*(pooled[kind, : len(texts)] for kind in kinds))
        vectors = dict(zip(kinds, (part.numpy() for part in coming.wait()), strict=True))
        for params, indexes in by_params.items():
            made = _vectors(vectors[_POOLED.index(params.pooling)][indexes], params)
            for index, vector in zip(indexes, made, strict=True):
                if bool(np.isfinite(vector).all()):
                    results[index] = Items(vector.astype("<f4").tobytes())

    def _fill(self, texts: Sequence[Text], hidden: Tensor, results: list[Items | None]) -> None:
        wanted = [index for index, text in enumerate(texts) if text.pooling is None]
        starts = [0, *accumulate(len(text.tokens) for text in texts)]
        rows = [starts[index] + place for index in wanted for place in texts[index].masks]
        if not rows:
            return
        logits = self._model.logits(hidden[upload(np.array(rows), self._device)]).float()
        top = max(texts[index].top or 1 for index in wanted)
        values, tokens = (part.cpu() for part in logits.log_softmax(-1).topk(min(top, logits.shape[-1])))
        row = 0
        for index in wanted:
            count = len(texts[index].masks)
            results[index] = _filled(values[row : row + count], tokens[row : row + count], texts[index].top)
            row += count


def _vectors(pooled: np.ndarray[Any, Any], params: PoolingParams) -> np.ndarray[Any, Any]:
    """Vectors [S, D] as they are asked for, of pooled states [S, hidden]."""
    vectors: np.ndarray[Any, Any] = pooled[:, : params.dimensions]
    if params.normalize:
        with np.errstate(all="ignore"):  # what is not a number stays none, and is found out
            lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
            vectors = vectors / np.maximum(lengths, np.float32(_SHORTEST))
    return vectors


def _filled(values: Tensor, tokens: Tensor, top: int | None) -> Items | None:
    """Items of one text, from log probabilities and ids [masks, likeliest], falling."""
    if not bool(values[:, 0].isfinite().all()):
        return None
    likeliest = [
        list(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
    packed = pack_tokens(pairs[0][0] for pairs in likeliest)
    if top is None:
        return Items(packed)
    return Items(packed, [[pairs[0][1], [list(pair) for pair in pairs[:top]]] for pairs in likeliest])
