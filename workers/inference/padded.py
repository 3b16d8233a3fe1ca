"""A model for padded batches: token ids and a mask in, logits where the tokens were out.

It is what `forward` and transformers' generation loop compute with; everything between is ragged and paged.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.kernels.model import Model
from headrace.workers.inference.cache import PagedCache
from headrace.workers.inference.inputs import check_positions, check_rows, real_tokens
from headrace.workers.inference.ragged import kept_columns, last_columns, pack, source_slots, unpack
from headrace.workers.inference.replays import Replays

__all__ = ["PaddedModel"]


class PaddedModel:
    """A model, and the most tokens that one text may have.

    Attributes:
        model: it.
        max_tokens: of one text, its source included, padding not counted.
        replays: its graphs.
        prefix: what stands before the names of its arguments, in messages.
        device: where the model is.
        dtype: of its weights.
    """

    def __init__(self, model: Model, replays: Replays, *, max_tokens: int, prefix: str = "") -> None:
        weight = model.embedding.weight
        assert isinstance(weight, Tensor)
        self.model = model
        self.replays = replays
        self.max_tokens = max_tokens
        self.prefix = prefix
        self.device = weight.device
        self.dtype = weight.dtype

    def new_cache(self, expected_tokens: int | None = None) -> PagedCache:
        """An empty cache; if one knows how long its texts get, it takes the memory for that at once."""
        expected = None if expected_tokens is None else min(expected_tokens, self.max_tokens)
        return PagedCache(self.model.spec, dtype=self.dtype, device=self.device, expected_tokens=expected)

    def logits(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: PagedCache,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """Logits [B, K, vocab] in the wanted columns, zero for padding; the cache is added to.

        Raises:
            InvalidRequestError: mask, positions and cache do not fit each other.
            ContextLengthError: a text gets too long; the cache is as it was.
        """
        real = self._real(input_ids, mask, cache)
        if position_ids is not None:
            check_positions(position_ids, real, cache)
        columns = input_ids.shape[1]
        logits = self._compute(input_ids, real, cache, kept_columns(columns, logits_to_keep))
        if isinstance(logits_to_keep, Tensor):
            named = np.arange(columns)[logits_to_keep.cpu().numpy()]
            logits = logits[:, torch.from_numpy(np.unique(named, return_inverse=True)[1]).to(self.device)]
        return logits

    def next_logits(
        self, input_ids: Tensor, mask: Tensor | None, cache: PagedCache, logits_to_keep: int | Tensor
    ) -> Tensor:
        """As `logits`, for a loop that reads the last column: there are, of each text, those of its last token."""
        real = self._real(input_ids, mask, cache)
        columns = kept_columns(input_ids.shape[1], logits_to_keep)
        if len(columns) == 1 and not real[:, -1].all():
            begun = np.array(cache.lens or [0] * len(real)) > 0
            if (begun & ~real.any(1)).any():
                raise InvalidRequestError(
                    "A prompt ends before the last chunk of the prefill; pad on the left, or leave out "
                    "prefill_chunk_size.",
                    param=f"{self.prefix}attention_mask",
                )
            columns = last_columns(real)
        return self._compute(input_ids, real, cache, columns)

    def remember(self, states: Tensor, real: np.ndarray, cache: PagedCache) -> None:
        """Put what the model sees of sources, once for all, into a cache that is still empty.

        Args:
            states: [B, S, hidden] of an encoder.
            real: [B, S] bool, which of them are of tokens; at least one in each row.
            cache: of the texts about them.
        """
        mask = torch.from_numpy(real)
        with cache.lock:
            kv = cache.add_sources(mask)
            slots = torch.from_numpy(source_slots(cache)).to(self.device)
            self.model.remember(states[mask.to(self.device)], slots, kv)

    def check_prompt(self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Refuse what would fail, or go on from nothing, once generation has begun.

        Raises:
            InvalidRequestError: mask or positions are wrong, or a row has no token.
        """
        real = self._real(input_ids, mask, None)
        if position_ids is not None:
            check_positions(position_ids, real)
        check_rows(real, prefix=self.prefix)

    def check_length(self, length: int) -> None:
        """Refuse a text of so many tokens, its source included, if it is too long.

        Raises:
            ContextLengthError: it is.
        """
        if length > self.max_tokens:
            raise ContextLengthError(
                f"Prompt and output together would be {length} tokens, but the engine holds {self.max_tokens}. Shorten "
                "the prompt or lower max_new_tokens or max_length.",
                param="max_length",
            )

    def _real(self, input_ids: Tensor, mask: Tensor | None, cache: PagedCache | None) -> np.ndarray:
        rows, columns = input_ids.shape
        return real_tokens(mask, (rows, columns), cache, prefix=self.prefix)

    def _compute(self, input_ids: Tensor, real: np.ndarray, cache: PagedCache, columns: np.ndarray) -> Tensor:
        counts = real.sum(1)
        self.check_length(int((np.array(cache.lens or 0) + np.array(cache.source_lens or 0) + counts).max()))
        if not counts.any():
            cache.extend(torch.from_numpy(real))
            shape = (len(real), columns.shape[-1], self.model.spec.vocab_size)
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        input_ids = input_ids.to(self.device)
        with cache.lock:
            kv = cache.extend(torch.from_numpy(real))
            if real.shape[1] == columns.shape[-1] == 1 and real.all():
                logits = self.replays.logits(cache, input_ids.flatten())
                if logits is not None:
                    return logits[:, None]
            batch, wanted = pack(input_ids, real, columns, cache)
            return unpack(self.model(batch, kv), wanted)
