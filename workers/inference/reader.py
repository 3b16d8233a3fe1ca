"""Whole texts of a padded batch, each read in both directions: what encoders do, and what reads an encoder-decoder's
prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from headrace.errors import ContextLengthError, InvalidRequestError
from headrace.kernels.batch import Batch
from headrace.kernels.spec import ModelSpec
from headrace.workers.inference.inputs import check_ids, check_positions, check_token_types, real_tokens
from headrace.workers.inference.ragged import Texts, pack_texts

__all__ = ["Reader"]


class Reader:
    """Checks token ids and what belongs to them, and computes the states of the tokens.

    Args:
        states: gives the states [T, hidden] of a batch of whole texts.
        spec: of the model.
        max_tokens: of one text, padding not counted.
        device: where the model is.
    """

    def __init__(
        self, states: Callable[[Batch], Tensor], spec: ModelSpec, *, max_tokens: int, device: torch.device
    ) -> None:
        self._states = states
        self._spec = spec
        self._max_tokens = max_tokens
        self._device = device

    def check(self, input_ids: object, mask: Tensor | None) -> tuple[Tensor, np.ndarray]:
        """The ids [B, T] on the device, and which of them are real tokens.

        Raises:
            InvalidRequestError: they are no ids of the model, or the mask is none of them.
            ContextLengthError: a text is too long.
        """
        ids = check_ids(input_ids, self._spec.vocab_size)
        rows, columns = ids.shape
        real = real_tokens(mask, (rows, columns))
        longest = int(real.sum(1).max())
        if not longest:
            raise InvalidRequestError("attention_mask is all 0, so there is nothing to read.", param="attention_mask")
        if longest > self._max_tokens:
            raise ContextLengthError(
                f"A text has {longest} tokens, but the engine reads {self._max_tokens}. Shorten it; tokenizers do so "
                f"with truncation=True, max_length={self._max_tokens}.",
                param="input_ids",
            )
        return ids.to(self._device), real

    def read(
        self,
        input_ids: object,
        mask: Tensor | None,
        *,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Texts, Tensor]:
        """The texts, and the states [T, hidden] of their tokens.

        Raises:
            InvalidRequestError: an argument is wrong or does not fit the others.
            ContextLengthError: a text is too long.
        """
        ids, real = self.check(input_ids, mask)
        embedding = self._spec.embedding
        if position_ids is not None:
            check_positions(position_ids, real, first=embedding.positions.offset if embedding.positions else 0)
        types = None
        if token_type_ids is not None:
            rows, columns = ids.shape
            types = check_token_types(token_type_ids, (rows, columns), embedding.token_types).to(self._device)
        texts = pack_texts(ids, real, types)
        return texts, self._states(texts.batch)
