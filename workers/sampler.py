"""Sampling settings of the running sequences, kept in rows, and the choice of their next tokens.

Values that stay (temperature, seed, ...) are written once when a sequence gets its row; what changes with every token
(position, tokens seen by penalties) is known without the values of the last ones, or kept on the device. So a step can
be launched before the tokens of the last one are read. A batch of plain greedy rows needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.ops.sampling import Logprobs, SamplingRows, choose, logprobs_of
from headrace.workers.device import Download, upload
from headrace.workers.sequence import Sequence
from headrace.workers.token_state import TokenState

__all__ = ["NUM_SETTINGS", "Choice", "Choices", "Sampler", "settings_in"]

NUM_SETTINGS = 7  # numbers by which a sequence is sampled


class Choice(NamedTuple):
    """A sequence's next token; None if its logits were not numbers. `logprobs` as in `TokenRun`, for one token."""

    sequence: Sequence
    token: int | None
    logprobs: list[Any] | None


class Choices:
    """The choices of one step, on their way from the device."""

    def __init__(self, sequences: Items[Sequence], tokens: Tensor, logprobs: Logprobs | None = None) -> None:
        self._sequences = sequences
        parts = () if logprobs is None else (logprobs.chosen, logprobs.top_tokens, logprobs.top)
        self._coming = Download(tokens, *parts)

    def read(self) -> list[Choice]:
        """One choice for each sequence; this waits for the device."""
        tokens, *logprobs = (tensor.tolist() for tensor in self._coming.wait())
        entries = iter(_unpack(*logprobs) if logprobs else ())
        choices = []
        for sequence, token in zip(self._sequences, tokens, strict=True):
            wanted = sequence.sampling.logprobs
            entry = None if wanted is None else _cut(next(entries), wanted)
            choices.append(Choice(sequence, None if token < 0 else token, entry))
        return choices


class Sampler:
    """Settings by row; `choose` turns logits into tokens.

    Args:
        num_rows: most sequences that run at once.
        vocab: logits of each.
        device: where they are.

    Attributes:
        last_tokens: [rows + 1] int64, on the device: of each row the token chosen last, from which the next step may go
            on before the host knows it. The row after the last belongs to nobody.
    """

    def __init__(self, *, num_rows: int, vocab: int, device: torch.device | str = "cpu") -> None:
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._device = torch.device(device)
        self._edits = TokenState(num_rows=num_rows, vocab=vocab, device=device)
        self._sequences: list[Sequence | None] = [None] * num_rows
        self._greedy = np.zeros(num_rows, dtype=bool)
        self._temperature, self._top_p, self._min_p = np.zeros((3, num_rows), dtype=np.float32)
        self._top_k, self._choices = np.zeros((2, num_rows), dtype=np.int64)
        self._seeds = np.zeros(num_rows, dtype=np.uint64)
        self._logprobs = np.full(num_rows, -1, dtype=np.int64)

    def write_settings(self, sequences: Items[Sequence], into: np.ndarray) -> None:
        """Write the settings of sequences where `settings_in` finds them.

        Args:
            sequences: that are sampled next.
            into: [NUM_SETTINGS, size] int64 of zeros, which mean greedy ones; size is at least their number.
        """
        rows = self._bound(sequences)
        for row_of, values in zip(into, (self._temperature, self._top_p, self._min_p), strict=False):
            row_of.view(np.float32)[: len(rows)] = values[rows]
        into[3:6, : len(rows)] = self._top_k[rows], self._seeds[rows].view(np.int64), self._choices[rows]
        into[6, : len(rows)] = [sequence.num_chosen for sequence in sequences]

    def choose(self, logits: Tensor, sequences: Items[Sequence], tokens: Tensor | None = None) -> Choices:
        """Choose the next token of each sequence.

        Args:
            logits: [R, vocab], of each.
            sequences: R of them.
            tokens: [R] int64, if they were chosen and noted in `last_tokens` already, by their settings alone. Those of
                sequences that want logits edited are chosen again.
        """
        if not sequences:
            return Choices((), self.last_tokens[:0])
        rows = self._bound(sequences)
        edited = self._edits.edits(rows)
        if tokens is None:
            tokens = self._choose(logits, sequences, rows, edited=len(edited) > 0)
        elif len(edited):
            places = upload(edited, self._device)
            those = [sequences[place] for place in edited]
            again = self._choose(logits.index_select(0, places), those, rows[edited], edited=True)
            tokens = tokens.index_copy(0, places, again)
        return Choices(sequences, tokens, self._logprobs_of(logits, tokens, rows))

    def _choose(self, logits: Tensor, sequences: Items[Sequence], rows: np.ndarray, *, edited: bool) -> Tensor:
        host = np.zeros((1 + NUM_SETTINGS, len(rows)), dtype=np.int64)
        host[0] = rows
        self.write_settings(sequences, host[1:])
        row_of, *_, positions = inputs = upload(host, self._device)
        if edited:
            logits = self._edits.edit(logits, row_of, positions)
        tokens = choose(logits, None if self._greedy[rows].all() else settings_in(inputs[1:]))
        if edited:
            self._edits.count(tokens, row_of)
        # -1, where logits were no numbers, is no token; what is computed after it is dropped.
        self.last_tokens.index_copy_(0, row_of, tokens.clamp(min=0))
        return tokens

    def _logprobs_of(self, logits: Tensor, tokens: Tensor, rows: np.ndarray) -> Logprobs | None:
        """Of the rows that want them, as many as the one that wants most."""
        wanted = self._logprobs[rows]
        if wanted.max() < 0:
            return None
        those = upload(np.flatnonzero(wanted >= 0), self._device)
        return logprobs_of(logits.index_select(0, those), tokens.index_select(0, those), int(wanted.max()))

    def _bound(self, sequences: Items[Sequence]) -> np.ndarray:
        """The rows of sequences, which are theirs from now on."""
        for sequence in sequences:
            if self._sequences[sequence.row] is not sequence:
                self._sequences[sequence.row] = sequence
                self._bind(sequence)
        return np.array([sequence.row for sequence in sequences], dtype=np.int64)

    def _bind(self, sequence: Sequence) -> None:
        row, params = sequence.row, sequence.sampling
        self._greedy[row] = params.greedy
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = sequence.seed
        self._choices[row] = sequence.stream.choice
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._edits.bind(sequence)


def settings_in(inputs: Tensor) -> SamplingRows:
    """The settings that `Sampler.write_settings` wrote, [NUM_SETTINGS, size] int64 on the device."""
    size = inputs.shape[1]
    temperature, top_p, min_p = (inputs[row].view(torch.float32)[:size] for row in range(3))
    top_k, seeds, choices, positions = inputs[3:]
    return SamplingRows(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        choices=choices,
        positions=positions,
    )


def _cut(entry: list[Any], count: int) -> list[Any]:
    """Of the likeliest tokens as many as a row asked for; all rows got what the one that wants most got."""
    return [entry[0], entry[1][:count]]


def _unpack(chosen: list[float], top_tokens: list[list[int]], top: list[list[float]]) -> list[list[Any]]:
    """Per row `[logprob, [[token, logprob], ...]]`."""
    rows = zip(chosen, top_tokens, top, strict=True)
    return [[value, [list(pair) for pair in zip(ids, values, strict=True)]] for value, ids, values in rows]
