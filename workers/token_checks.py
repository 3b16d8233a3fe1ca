"""Whether a request's tokens are those of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.card import ModelCard
from headrace.errors import InvalidRequestError
from headrace.sampling import SamplingParams

__all__ = ["check_tokens"]


def check_tokens(card: ModelCard, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams) -> None:
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
        if (largest := max(ids, default=0)) >= card.vocab_size:
            raise InvalidRequestError(
                f"{name} holds token id {largest}, but {card.name} has ids 0 to {card.vocab_size - 1}; "
                "use the tokenizer that its card names.",
                param=name,
            )
