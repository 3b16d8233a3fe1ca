"""What logits go through before a token is chosen (step 1 of sampling.py), from tables that stay on the device.

A running sequence has a row in `EditTables`, written once when it gets the row. Only what its output holds changes from
step to step, and `count` keeps that up to date from the tokens just chosen, which the host need not have seen.

Both ops are pairs. They read and write only rows of sequences; tables may have more rows than a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.ops.pair import pair

__all__ = ["EditTables", "count", "edit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditTables:
    """How the logits of S rows are edited.

    Attributes:
        penalties: [S, 3] float32, repetition, presence, frequency; 1, 0, 0 for none.
        seen: [S, vocab] int32, twice the occurrences in the output, plus one if the prompt has the token; None as long
            as no row has penalties.
        biased: [S, N] int32, different tokens; those that are held back come first.
        biases: [S, N] float32, what is added to their logits.
        limits: [S, 3] int64, how many of `biased` are held back and how many there are; and the number of tokens
            before which those are held back.
    """

    penalties: Tensor
    seen: Tensor | None
    biased: Tensor
    biases: Tensor
    limits: Tensor


@pair
def edit(logits: Tensor, tables: EditTables, rows: Tensor, positions: Tensor) -> Tensor:
    """The edited logits [R, vocab] float32: biases are added, tokens held back, then penalties taken off.

    Args:
        logits: [R, vocab] in any floating type.
        tables: how they are edited.
        rows: [R] int64, which row of the tables each is of.
        positions: [R] int64, how many tokens each sequence has generated.
    """
    edited = logits.to(torch.float32, copy=True)
    limits, penalties = tables.limits[rows].tolist(), tables.penalties[rows].tolist()
    for index, row in enumerate(rows.tolist()):
        (held_back, size, min_tokens), logit = limits[index], edited[index]
        if size:
            tokens = tables.biased[row, :size].long()
            logit[tokens] += tables.biases[row, :size]
            if int(positions[index]) < min_tokens:
                logit[tokens[:held_back]] = -torch.inf
        if penalties[index] != [1.0, 0.0, 0.0]:
            assert tables.seen is not None
            tokens = tables.seen[row].nonzero()[:, 0]
            logit[tokens] = _penalized(logit[tokens], tables.seen[row, tokens], tables.penalties[row])
    return edited


def _penalized(value: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    repetition, presence, frequency = penalties
    value = torch.where(value > 0, value / repetition, value * repetition)
    occurrences = (seen >> 1).float()
    edited: Tensor = value - frequency * occurrences - presence * (occurrences > 0)
    return edited


@pair
def count(tokens: Tensor, tables: EditTables, rows: Tensor) -> None:
    """Note in `seen` that rows have generated a token more.

    Args:
        tokens: [R] int64, negative for none.
        tables: `seen` is written to, unless there is none.
        rows: [R] int64, all different, but for those that belong to nobody.
    """
    if tables.seen is not None:
        chosen = (tokens >= 0).nonzero()[:, 0]
        tables.seen[rows[chosen], tokens[chosen]] += 2
