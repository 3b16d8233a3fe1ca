"""What an engine computes before it says READY, so that nothing is compiled while it serves.

Kernels are compiled for what they are launched with: constants that follow from shapes, whether a number is 1 or a
multiple of 16, types. So texts of many lengths are computed, alone and together, decodes beside prompts, at short and
at long contexts; and once with each setting of a sampler, for each has code of its own. Texts are so short, and ends
come so soon, that all of it takes about a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headrace.card import ModelCard
from headrace.kernels.tuning import MOST_ROWS
from headrace.messages import Assignment, pack_tokens
from headrace.workers.config import EngineConfig

__all__ = ["all_options", "examples", "lengths_up_to", "longest_text"]

# Each has a path of its own through the sampler.
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 0.9, "top_k": 1},
    {"temperature": 0.9, "top_k": 50},
    {"temperature": 0.9, "top_k": 2000},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.1},
    {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [0]},
    {"temperature": 0.0, "logit_bias": [[0, -1.0]]},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.9, "logprobs": 5},
)
_MANY = 3  # tokens that a text is continued by


def lengths_up_to(most: int) -> list[int]:
    """Lengths on both sides of where kernels may change: powers of two, one more each, and the longest."""
    powers = [1 << power for power in range(most.bit_length())]
    return sorted({length for power in powers for length in (power, power + 1) if length <= most} | {most})


def all_options() -> dict[str, Any]:
    """Everything that a sampler can be asked for at once."""
    together: dict[str, Any] = {}
    for options in _OPTIONS:
        together |= options
    return together | {"temperature": 0.9, "top_k": 50}


def longest_text(limit: int, more: int, *, block_size: int, sources: bool) -> int:
    """Tokens of the longest text that can be continued by `more` within a limit; less than 1 if there is none.

    A source fills its last block, and is continued by what the answer begins with.
    """
    return (limit - more - 1) // block_size * block_size if sources else limit - more


def examples(card: ModelCard, config: EngineConfig, *, sources: bool, everything: bool) -> Iterator[list[Assignment]]:
    """Streams to be computed together, one list after the other.

    Args:
        card: of the model as it is served.
        config: of its engine.
        sources: whether an encoder reads the texts.
        everything: or only a small text, where nothing is compiled.
    """
    longest = longest_text(card.max_model_len, _MANY, block_size=config.block_size, sources=sources)
    if longest < 1:
        return
    make = _Maker(card, longest, config.block_size)
    if not everything:
        yield [make(32)]
        return
    budget = max(1, min(config.max_batch_tokens, longest))
    for length in lengths_up_to(budget):
        yield [make(length, max_tokens=1)]
    if (many := min(config.max_num_seqs, config.max_batch_tokens // budget)) > 1:
        yield [make(budget, max_tokens=1) for _ in range(many)]  # more tokens than one text can have
    if sources:
        # A source is read in one piece, also if it exceeds the budget, which no graph does.
        for length in lengths_up_to(min(max(budget, MOST_ROWS) + 1, longest)):
            if length > budget:
                yield [make(length, max_tokens=1)]
        # Answers are as long as prompts are elsewhere.
        for length in lengths_up_to(min(config.max_batch_tokens, card.max_model_len)):
            yield [make(3, answered=length)]
    for options in _OPTIONS:
        yield [make(3, **options)]
    for count in lengths_up_to(config.max_num_seqs):
        yield [make(3, max_tokens=2) for _ in range(count)]
        yield [make(3, **all_options()) for _ in range(count)]
    for count in sorted({min(count, config.max_num_seqs) for count in (2, 5, 17, 65, 129, config.max_num_seqs)}):
        for context in (1, 100, budget) if count not in (65, 129) else (100,):
            yield from _mixed(make, count, min(context, longest), budget)
    # A decode beside what an encoder-decoder computes of an answer only if a stream gave way or comes from elsewhere;
    # and both so short that one program attends to all of a context.
    for answered in (1, 100):
        yield [make(1), make(3, answered=answered)]


def _mixed(make: _Maker, count: int, context: int, budget: int) -> Iterator[list[Assignment]]:
    """Decodes of some texts beside a prompt that does not fit into the step in which they begin."""
    share = max(1, min(context, budget // max(1, count - 1)))
    yield [*(make(share) for _ in range(count - 1)), make(budget)]


class _Maker:
    """Makes streams, each of its own content."""

    def __init__(self, card: ModelCard, longest: int, block_size: int) -> None:
        self._card = card
        self._longest = longest
        self._block_size = block_size
        self._made = 0

    def __call__(self, length: int, *, answered: int = 0, **sampling: Any) -> Assignment:
        """A text of a length, of which a part was answered; or as much of both as there may be."""
        self._made += 1
        length = min(length, self._longest)
        source = -(-length // self._block_size) * self._block_size
        answered = max(0, min(answered, self._card.max_model_len - source - 1 - _MANY))
        return Assignment(
            request=b"warm-up-%d" % self._made,
            choice=0,
            attempt=0,
            prompt=self._tokens(length),
            output=self._tokens(answered),
            sampling={
                "temperature": 0.0,
                "max_tokens": answered + _MANY,
                "ignore_eos": True,
                "seed": 1,
                **sampling,
            },
        )

    def _tokens(self, count: int) -> bytes:
        return pack_tokens((self._made + place) % self._card.vocab_size for place in range(count))
