"""The tensors of one step: tokens of several sequences side by side, without padding.

Sequences that compute a single token come first. T tokens, S sequences, N of them sampled, B blocks of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Batch"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step, in the form that the model takes.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, of each token in its sequence.
        slots: [T] int64, where its keys and values go in the cache: block * block_size + offset.
        query_starts: [S + 1] int32, where the tokens of each sequence begin.
        context_lens: [S] int32, tokens that each sequence attends to, this step's included.
        block_tables: [S, B] int32, blocks of each sequence in order; what lies past its context is not read.
        num_decodes: sequences with a single token.
        query_lens: tokens of each sequence, known to the host.
        context_lens_host: `context_lens` as numbers.
        logits_rows: [N] int64, the tokens whose logits are wanted; None means each token, in order.
        block_size: tokens of one block.
        cross: for a decoder with cross attention, where the keys and values of each sequence's source are: a batch
            with the same queries and other contexts.
        token_types: [T] int64, segment of each token, for models that tell segments apart; None means all 0.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    num_decodes: int
    query_lens: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    logits_rows: Tensor | None
    block_size: int
    cross: Batch | None = None
    token_types: Tensor | None = None
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def shared(self, key: Any, make: Callable[[], V]) -> V:
        """What is the same for every layer of this step, made by the first that asks."""
        if key not in self._shared:
            self._shared[key] = make()
        value: V = self._shared[key]
        return value
