"""What an encoder makes of texts, on its way from the device, and made on the host into what was asked for.

S texts, N masks, D numbers of a vector. The copies are launched behind what computes the texts, so that the device can
go on with the next ones before anybody reads these.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from headrace.messages import pack_tokens
from headrace.tasks import PoolingParams
from headrace.workers.device import Download

__all__ = ["Items", "Results", "Text"]

_SHORTEST = 1e-12  # by which a vector is divided: PyTorch's


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What is computed of one text.

    Attributes:
        tokens: of the text.
        pooling: how its vector is made; None if its masks are to be filled.
        masks: places of the mask tokens, at least one if they are to be filled.
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


class Results:
    """What came of texts that were launched together.

    Args:
        texts: S of them.
        pooled: [S, hidden] of all texts, on the device, by the ways of pooling that are asked for.
        likeliest: log probabilities and ids [N, likeliest], falling, of the masks to be filled, on the device; None
            without any.
    """

    def __init__(
        self, texts: Sequence[Text], pooled: Mapping[str, Tensor], likeliest: tuple[Tensor, Tensor] | None
    ) -> None:
        self._texts = texts
        self._poolings = tuple(pooled)
        self._coming = Download(*pooled.values(), *(likeliest or ()))

    def read(self) -> list[Items | None]:
        """Of each text, None if they are not numbers; this waits for the device."""
        arrived = self._coming.wait()
        results: list[Items | None] = [None] * len(self._texts)
        count = len(self._poolings)
        self._embed(dict(zip(self._poolings, arrived[:count], strict=True)), results)
        if likeliest := arrived[count:]:
            values, tokens = likeliest
            self._fill(values, tokens, results)
        return results

    def _embed(self, pooled: Mapping[str, Tensor], results: list[Items | None]) -> None:
        by_params: dict[PoolingParams, list[int]] = {}
        for index, text in enumerate(self._texts):
            if text.pooling is not None:
                by_params.setdefault(text.pooling, []).append(index)
        for params, indexes in by_params.items():
            made = _vectors(pooled[params.pooling].numpy()[indexes], params)
            for index, vector in zip(indexes, made, strict=True):
                if bool(np.isfinite(vector).all()):
                    results[index] = Items(vector.astype("<f4").tobytes())

    def _fill(self, values: Tensor, tokens: Tensor, results: list[Items | None]) -> None:
        row = 0
        for index, text in enumerate(self._texts):
            if text.pooling is None:
                rows = slice(row, row + len(text.masks))
                results[index] = _filled(values[rows], tokens[rows], text.top)
                row = rows.stop


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
