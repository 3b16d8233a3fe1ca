"""Whether a request's tokens are those of a model."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from headrace.card import ModelCard
from headrace.errors import InvalidRequestError
from headrace.sampling import SamplingParams

__all__ = ["check_tokens", "largest_id"]


def check_tokens(card: ModelCard, prompt: array[int], output: array[int], sampling: SamplingParams) -> None:
    """Refuse a prompt without tokens, and tokens that the model does not have.

    Raises:
        InvalidRequestError: names the first of them.
    """
    if not prompt:
        raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
    named: tuple[tuple[str, Iterable[int]], ...] = (
        ("prompt", prompt),
        ("output", output),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", sampling.logit_bias),
    )
    for name, ids in named:
        if (largest := largest_id(ids)) >= card.vocab_size:
            raise InvalidRequestError(
                f"{name} holds token id {largest}, but {card.name} has ids 0 to {card.vocab_size - 1}; "
                "use the tokenizer that its card names.",
                param=name,
            )


def largest_id(ids: Iterable[int]) -> int:
    """The largest of some token ids, 0 if there are none; of a prompt without making an object of each."""
    if isinstance(ids, array):
        return int(np.frombuffer(ids, np.uint32).max(initial=0))
    return max(ids, default=0)
