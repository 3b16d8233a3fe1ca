"""What sequences have seen and want edited, in rows on the device: penalties, logit_bias, min_tokens.

A row is written when a sequence gets it, from the prompt and from what of its output is known by then: a sequence that
was preempted, or comes from another attempt, goes on where it was. Afterwards the device counts the tokens it chooses,
so a step needs nothing from the host. As long as nobody asks for any of it, nothing is allocated.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.ops.edits import EditTables, count, edit
from headrace.sampling import MAX_LOGIT_BIAS
from headrace.workers.device import upload
from headrace.workers.sequence import Sequence

__all__ = ["TokenState"]

_MOST_BIASED = 2 * MAX_LOGIT_BIAS  # with tokens that end a sequence, of which a request names few and a model fewer
_NO_PENALTIES = (1.0, 0.0, 0.0)


class TokenState:
    """Rows of `EditTables`, which sequences are bound to; one more is for what fills a batch up.

    Args:
        num_rows: rows that sequences may have.
        vocab: logits of a row.
        device: where they are.
    """

    def __init__(self, *, num_rows: int, vocab: int, device: torch.device | str = "cpu") -> None:
        self._num_rows = num_rows
        self._vocab = vocab
        self._device = torch.device(device)
        self._tables: EditTables | None = None
        self._edits = np.zeros(num_rows, dtype=bool)

    def edits(self, rows: np.ndarray) -> np.ndarray:
        """Which of the sequences of some rows want anything edited, as places among them."""
        return np.flatnonzero(self._edits[rows])

    def bind(self, sequence: Sequence) -> None:
        """Give the row of a sequence to it, with all the tokens it has; what was there is forgotten.

        Tokens that are chosen later are counted by `count`, so the host must know all that were chosen before.
        """
        row, params = sequence.row, sequence.sampling
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        penalized = penalties != _NO_PENALTIES
        before = bool(self._edits[row])
        self._edits[row] = penalized or bool(params.logit_bias) or params.min_tokens > 0
        if not (before or self._edits[row]):
            return
        tables = self._allocated(penalized)
        held_back = sequence.stop_ids if params.min_tokens else ()
        biases = dict.fromkeys(held_back, 0.0) | dict(params.logit_bias)  # those held back stay first
        assert len(biases) <= _MOST_BIASED
        self._write(tables.penalties[row], np.array(penalties, dtype=np.float32))
        self._write(tables.limits[row], np.array((len(held_back), len(biases), params.min_tokens), dtype=np.int64))
        if biases:
            self._write(tables.biased[row, : len(biases)], np.array(list(biases), dtype=np.int32))
            self._write(tables.biases[row, : len(biases)], np.array(list(biases.values()), dtype=np.float32))
        if penalized:
            assert tables.seen is not None
            self._write(tables.seen[row], self._seen_by(sequence))

    def edit(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """As the op of this name; the logits themselves if no row was ever bound to a sequence that wants it."""
        return logits if self._tables is None else edit(logits, self._tables, rows, positions)

    def count(self, tokens: Tensor, rows: Tensor) -> None:
        """As the op of this name. Rows without penalties may be counted, too."""
        if self._tables is not None:
            count(tokens, self._tables, rows)

    def _allocated(self, penalized: bool) -> EditTables:
        """The tables, with all that these settings need of them."""
        rows, on = self._num_rows + 1, self._device
        if self._tables is None:
            self._tables = EditTables(
                penalties=upload(np.array(_NO_PENALTIES, dtype=np.float32), on).repeat(rows, 1),
                seen=None,
                biased=torch.zeros(rows, _MOST_BIASED, dtype=torch.int32, device=on),
                biases=torch.zeros(rows, _MOST_BIASED, dtype=torch.float32, device=on),
                limits=torch.zeros(rows, 3, dtype=torch.int64, device=on),
            )
        if penalized and self._tables.seen is None:
            seen = torch.zeros(rows, self._vocab, dtype=torch.int32, device=on)
            self._tables = dataclasses.replace(self._tables, seen=seen)
        return self._tables

    def _seen_by(self, sequence: Sequence) -> np.ndarray:
        tokens = np.array(sequence.tokens, dtype=np.int64)
        prompt, output = tokens[: sequence.num_prompt], tokens[sequence.num_prompt :]
        in_prompt = np.bincount(prompt, minlength=self._vocab) > 0
        return (2 * np.bincount(output, minlength=self._vocab) + in_prompt).astype(np.int32)

    def _write(self, place: Tensor, values: np.ndarray) -> None:
        place.copy_(upload(values, self._device), non_blocking=True)
