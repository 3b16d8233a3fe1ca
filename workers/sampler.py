"""Sampling settings of the running sequences, kept in rows, and the choice of their next tokens.

Values that stay (temperature, seed, ...) are written once when a sequence gets its row; what changes with every token
(position, counts of penalties) is added per step. A batch of plain greedy rows needs none of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.ops.sampling import (
    Bias,
    Penalties,
    Sampled,
    SamplingRows,
    sample,
)
from headrace.workers.device import Download, upload
from headrace.workers.sequence import Sequence

__all__ = ["Choice", "Choices", "Sampler"]

_NO_IDS = np.empty(0, dtype=np.int64)
_NO_PENALTIES = (1.0, 0.0, 0.0)


class Choice(NamedTuple):
    """A sequence's next token; None if its logits were not numbers. `logprobs` as in `TokenRun`, for one token."""

    sequence: Sequence
    token: int | None
    logprobs: list[Any] | None


class Choices:
    """The choices of one step, on their way from the device."""

    def __init__(self, sequences: Items[Sequence], sampled: Sampled) -> None:
        self._sequences = sequences
        logprobs = sampled.logprobs
        parts = () if logprobs is None else (logprobs.chosen, logprobs.top_tokens, logprobs.top)
        self._coming = Download(sampled.tokens, *parts)

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


class _Counts:
    """Distinct tokens that the penalties of one sequence see, with their occurrences in the output."""

    def __init__(self, sequence: Sequence) -> None:
        self._index: dict[int, int] = {}
        self._seen = sequence.num_prompt
        self.tokens: array[int] = array("q")
        self.counts: array[float] = array("f")
        if sequence.sampling.repetition_penalty != 1.0:
            for token in sequence.tokens[: sequence.num_prompt]:
                self._add(token, 0.0)

    def update(self, sequence: Sequence) -> None:
        """Count the tokens that came since the last call."""
        assert not sequence.num_expected, "what is to be counted must be known"
        for token in sequence.tokens[self._seen :]:
            self._add(token, 1.0)
        self._seen = sequence.num_tokens

    def _add(self, token: int, count: float) -> None:
        index = self._index.setdefault(token, len(self.tokens))
        if index == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(count)
        else:
            self.counts[index] += count


@dataclass(slots=True)
class _Row:
    """What does not fit an array: the ragged settings of one row."""

    sequence: Sequence
    bias_tokens: np.ndarray
    bias_values: np.ndarray
    counts: _Counts | None


class Sampler:
    """Settings by row; `choose` turns logits into tokens.

    Attributes:
        last_tokens: [rows + 1] int64, on the device: of each row the token chosen last, from which the next step may go
            on before the host knows it. The row after the last belongs to nobody.
    """

    def __init__(self, *, num_rows: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._rows: list[_Row | None] = [None] * num_rows
        self._plain = np.zeros(num_rows, dtype=bool)
        self._temperature = np.zeros(num_rows, dtype=np.float32)
        self._top_k = np.zeros(num_rows, dtype=np.int64)
        self._top_p = np.ones(num_rows, dtype=np.float32)
        self._min_p = np.zeros(num_rows, dtype=np.float32)
        self._seeds = np.zeros(num_rows, dtype=np.uint64)
        self._choices = np.zeros(num_rows, dtype=np.int64)
        self._penalties = np.zeros((3, num_rows), dtype=np.float32)  # repetition, presence, frequency
        self._logprobs = np.full(num_rows, -1, dtype=np.int64)

    def choose(self, logits: Tensor, sequences: Items[Sequence]) -> Choices:
        """Choose the next token of each sequence, whose logits are the rows of `logits`."""
        if not sequences:
            return Choices((), Sampled(tokens=self.last_tokens[:0], logprobs=None))
        rows = np.array([sequence.row for sequence in sequences])
        sampled = sample(logits, self._settings(sequences, rows))
        # -1, where logits were no numbers, is no token; what is computed after it is dropped.
        self.last_tokens.index_copy_(0, self._tensor(rows), sampled.tokens.clamp(min=0))
        return Choices(sequences, sampled)

    @staticmethod
    def looks_back(sequence: Sequence) -> bool:
        """Whether a choice takes the values of the tokens before it: penalties are counted on the host."""
        return _penalties(sequence) != _NO_PENALTIES

    def _settings(self, sequences: Items[Sequence], rows: np.ndarray) -> SamplingRows | None:
        """The settings of the rows at hand, or None if all are plain greedy ones."""
        states = [self._state(sequence) for sequence in sequences]
        if self._plain[rows].all():
            return None
        logprobs = self._logprobs[rows]
        with_logprobs = np.flatnonzero(logprobs >= 0)
        return SamplingRows(
            temperature=self._tensor(self._temperature[rows]),
            top_k=self._tensor(self._top_k[rows]),
            top_p=self._tensor(self._top_p[rows]),
            min_p=self._tensor(self._min_p[rows]),
            seeds=self._tensor(self._seeds[rows].view(np.int64)),
            choices=self._tensor(self._choices[rows]),
            positions=self._tensor(np.array([sequence.num_chosen for sequence in sequences], dtype=np.int64)),
            bias=self._bias(states),
            penalties=self._seen(states, rows),
            logprob_rows=self._tensor(with_logprobs) if len(with_logprobs) else None,
            num_logprobs=int(logprobs.max(initial=0)),
        )

    def _state(self, sequence: Sequence) -> _Row:
        state = self._rows[sequence.row]
        if state is None or state.sequence is not sequence:
            state = self._rows[sequence.row] = self._bind(sequence)
        return state

    def _bind(self, sequence: Sequence) -> _Row:
        row, params = sequence.row, sequence.sampling
        penalties = _penalties(sequence)
        penalized = penalties != _NO_PENALTIES
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = sequence.seed
        self._choices[row] = sequence.stream.choice
        self._penalties[:, row] = penalties
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        edited = penalized or bool(params.logit_bias) or params.min_tokens > 0
        self._plain[row] = params.greedy and not edited and params.logprobs is None
        return _Row(
            sequence=sequence,
            bias_tokens=np.array(list(params.logit_bias), dtype=np.int64),
            bias_values=np.array(list(params.logit_bias.values()), dtype=np.float32),
            counts=_Counts(sequence) if penalized else None,
        )

    def _bias(self, states: list[_Row]) -> Bias | None:
        """logit_bias, and -inf for tokens that would end a sequence before its min_tokens."""
        tokens, values = [], []
        for state in states:
            held_back = _NO_IDS
            if state.sequence.num_chosen < state.sequence.sampling.min_tokens:
                held_back = np.array(state.sequence.stop_ids, dtype=np.int64)
            tokens.append(np.concatenate((state.bias_tokens, held_back)))
            values.append(np.concatenate((state.bias_values, np.full(len(held_back), -np.inf, dtype=np.float32))))
        lens = [len(part) for part in tokens]
        if not any(lens):
            return None
        return Bias(
            rows=self._tensor(np.repeat(np.arange(len(states)), lens)),
            tokens=self._tensor(np.concatenate(tokens)),
            values=self._tensor(np.concatenate(values)),
        )

    def _seen(self, states: list[_Row], rows: np.ndarray) -> Penalties | None:
        lens = []
        tokens, counts = array("q"), array("f")
        for state in states:
            if state.counts is not None:
                state.counts.update(state.sequence)
                tokens += state.counts.tokens
                counts += state.counts.counts
            lens.append(0 if state.counts is None else len(state.counts.tokens))
        if not tokens:
            return None
        repetition, presence, frequency = self._penalties[:, rows]
        return Penalties(
            rows=self._tensor(np.repeat(np.arange(len(states)), lens)),
            tokens=self._tensor(np.array(tokens, dtype=np.int64)),
            counts=self._tensor(np.array(counts, dtype=np.float32)),
            repetition=self._tensor(repetition),
            presence=self._tensor(presence),
            frequency=self._tensor(frequency),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return upload(values, self._device)


def _penalties(sequence: Sequence) -> tuple[float, float, float]:
    """For repetition, presence and frequency."""
    params = sequence.sampling
    return params.repetition_penalty, params.presence_penalty, params.frequency_penalty


def _cut(entry: list[Any], count: int) -> list[Any]:
    """Of the likeliest tokens as many as a row asked for; all rows got what the one that wants most got."""
    return [entry[0], entry[1][:count]]


def _unpack(chosen: list[float], top_tokens: list[list[int]], top: list[list[float]]) -> list[list[Any]]:
    """Per row `[logprob, [[token, logprob], ...]]`."""
    rows = zip(chosen, top_tokens, top, strict=True)
    return [[value, [list(pair) for pair in zip(ids, values, strict=True)]] for value, ids, values in rows]
