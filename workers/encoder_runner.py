"""Computes whole texts on an encoder: vectors for those that want one, likely tokens for the masks of the others.

It owns what has a device and decides nothing about who runs. T tokens in all, S texts, N masks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.batch import Batch
from headrace.messages import pack_tokens
from headrace.tasks import PoolingParams
from headrace.workers.batch import whole_texts
from headrace.workers.device import upload

if TYPE_CHECKING:
    from headrace.kernels.model import Model

__all__ = ["EncoderRunner", "Items", "Text"]


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
    """The model, and `run`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._device = model.embedding.weight.device
        assert isinstance(self._device, torch.device)

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self._device.type == "cuda"

    @torch.inference_mode()
    def run(self, texts: Sequence[Text]) -> list[Items | None]:
        """Compute texts together; None for one whose results are not numbers."""
        batch = self._batch(texts)
        hidden = self._model.hidden(batch, None)
        results: list[Items | None] = [None] * len(texts)
        self._embed(texts, hidden, batch, results)
        self._fill(texts, hidden, batch, results)
        return results

    def _batch(self, texts: Sequence[Text]) -> Batch:
        token_ids = np.concatenate([np.frombuffer(text.tokens, np.uint32) for text in texts])
        return whole_texts(self._tensor(token_ids.astype(np.int64)), [len(text.tokens) for text in texts])

    def _embed(self, texts: Sequence[Text], hidden: Tensor, batch: Batch, results: list[Items | None]) -> None:
        by_params: dict[PoolingParams, list[int]] = {}
        for index, text in enumerate(texts):
            if text.pooling is not None:
                by_params.setdefault(text.pooling, []).append(index)
        for params, indexes in by_params.items():
            vectors = _pool(hidden, batch, params)[self._tensor(np.array(indexes))].cpu()
            for index, vector in zip(indexes, vectors, strict=True):
                if bool(vector.isfinite().all()):
                    results[index] = Items(vector.numpy().astype("<f4").tobytes())

    def _fill(self, texts: Sequence[Text], hidden: Tensor, batch: Batch, results: list[Items | None]) -> None:
        wanted = [index for index, text in enumerate(texts) if text.pooling is None]
        starts = [0, *accumulate(batch.query_lens)]
        rows = [starts[index] + place for index in wanted for place in texts[index].masks]
        if not rows:
            return
        logits = self._model.logits(hidden[self._tensor(np.array(rows))]).float()
        top = max(texts[index].top or 1 for index in wanted)
        values, tokens = (part.cpu() for part in logits.log_softmax(-1).topk(min(top, logits.shape[-1])))
        row = 0
        for index in wanted:
            count = len(texts[index].masks)
            results[index] = _filled(values[row : row + count], tokens[row : row + count], texts[index].top)
            row += count

    def _tensor(self, values: np.ndarray) -> Tensor:
        return upload(values, self._device)


def _pool(hidden: Tensor, batch: Batch, params: PoolingParams) -> Tensor:
    """Vectors [S, D] of all texts in float32, from states [T, hidden]."""
    starts = batch.query_starts.long()
    if params.pooling == "cls":
        vectors = hidden[starts[:-1]].float()
    else:
        lens = batch.context_lens.long()
        text_of = torch.repeat_interleave(torch.arange(len(lens), device=hidden.device), lens, output_size=len(hidden))
        sums = torch.zeros(len(lens), hidden.shape[1], device=hidden.device).index_add_(0, text_of, hidden.float())
        vectors = sums / lens[:, None]
    vectors = vectors[:, : params.dimensions]
    return torch.nn.functional.normalize(vectors, dim=1) if params.normalize else vectors


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
