"""What logits are edited by, kept in rows on the device, against the ragged lists that say the same of every step."""

from __future__ import annotations

import math
from array import array

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.messages import StreamId
from headrace.sampling import SamplingParams
from headrace.workers.sequence import Sequence
from headrace.workers.token_state import TokenState
from tests.support.logit_edits import Bias, Penalties, edit_logits

VOCAB = 23
PLAIN = SamplingParams()

params = st.one_of(
    st.just(PLAIN),
    st.builds(
        SamplingParams,
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5, -0.25]),
        frequency_penalty=st.sampled_from([0.0, 0.1, -1.0]),
        min_tokens=st.sampled_from([0, 0, 3]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=4),
    ),
)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=8).map(lambda ids: array("I", ids))


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    """A stream, perhaps with output of an earlier attempt, and some tokens that end it."""
    stop_ids = tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True)))
    prompt = draw(tokens.filter(len))
    return Sequence(StreamId(b"", 0, 0), prompt, draw(params), max_tokens=100, output=draw(tokens), stop_ids=stop_ids)


def ragged(logits: torch.Tensor, batch: list[Sequence]) -> torch.Tensor:
    """What `edit_logits` makes of a batch, told all that its sequences hold."""
    biases = [
        (index, token, value)
        for index, sequence in enumerate(batch)
        for token, value in [
            *sequence.sampling.logit_bias.items(),
            *((id, -math.inf) for id in sequence.stop_ids if sequence.num_output < sequence.sampling.min_tokens),
        ]
    ]
    seen = [
        (index, token, float(list(sequence.tokens[sequence.num_prompt :]).count(token)))
        for index, sequence in enumerate(batch)
        for token in sorted(set(sequence.tokens))
    ]

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(sequence.sampling, name) for sequence in batch])

    bias = Bias(
        rows=torch.tensor([row for row, _, _ in biases], dtype=torch.int64),
        tokens=torch.tensor([token for _, token, _ in biases], dtype=torch.int64),
        values=torch.tensor([value for _, _, value in biases], dtype=torch.float32),
    )
    penalties = Penalties(
        rows=torch.tensor([row for row, _, _ in seen]),
        tokens=torch.tensor([token for _, token, _ in seen]),
        counts=torch.tensor([number for _, _, number in seen]),
        repetition=column("repetition_penalty"),
        presence=column("presence_penalty"),
        frequency=column("frequency_penalty"),
    )
    return edit_logits(logits, bias, penalties)


def edited(state: TokenState, logits: torch.Tensor, batch: list[Sequence]) -> torch.Tensor:
    rows, positions = ([s.row for s in batch], [s.num_output for s in batch])
    return state.edit(logits, torch.tensor(rows), torch.tensor(positions))


class World:
    """Sequences that come, go, are preempted and come back into any row, as a scheduler has it."""

    def __init__(self, data: st.DataObject, num_rows: int) -> None:
        self.data = data
        self.state = TokenState(num_rows=num_rows, vocab=VOCAB)
        self.free = set(range(num_rows))
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []

    def admit(self) -> None:
        if not self.waiting or self.data.draw(st.booleans()):
            self.waiting.append(self.data.draw(sequences()))
        sequence = self.waiting.pop(self.data.draw(st.integers(0, len(self.waiting) - 1)))
        sequence.row = self.data.draw(st.sampled_from(sorted(self.free)))
        self.free.discard(sequence.row)
        self.state.bind(sequence)
        self.running.append(sequence)

    def leave(self) -> None:
        sequence = self.running.pop(self.data.draw(st.integers(0, len(self.running) - 1)))
        self.free.add(sequence.row)
        if self.data.draw(st.booleans()):
            self.waiting.append(sequence)

    def step(self) -> None:
        batch = [sequence for sequence in self.running if self.data.draw(st.booleans())]
        if not batch:
            return
        logits = torch.randn(len(batch), VOCAB, dtype=torch.float32)
        torch.testing.assert_close(edited(self.state, logits, batch), ragged(logits, batch), rtol=0, atol=0)
        chosen = torch.tensor([self.data.draw(st.integers(-1, VOCAB - 1)) for _ in batch])
        self.state.count(chosen, torch.tensor([sequence.row for sequence in batch]))
        for sequence, token in zip(batch, chosen.tolist(), strict=True):
            if token >= 0:
                sequence.tokens.append(token)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_history_edits_as_the_lists_of_all_tokens_say(data):
    world = World(data, num_rows=3)
    for _ in range(data.draw(st.integers(1, 25))):
        moves = [world.step]
        if world.free:
            moves.append(world.admit)
        if world.running:
            moves.append(world.leave)
        data.draw(st.sampled_from(moves))()


def make_sequence(row: int, **sampling) -> Sequence:
    stop_ids = sampling.pop("stop_ids", ())
    sequence = Sequence(
        StreamId(b"", 0, 0), array("I", [1, 2, 2]), SamplingParams(**sampling), max_tokens=9, stop_ids=stop_ids
    )
    sequence.row = row
    return sequence


def test_who_wants_nothing_costs_nothing():
    state = TokenState(num_rows=2, vocab=5)
    state.bind(make_sequence(1, temperature=0.5, top_p=0.9))
    logits = torch.randn(1, 5)
    assert state.edit(logits, torch.tensor([1]), torch.tensor([0])) is logits
    assert state.edits(np.array([0, 1])).tolist() == []
    state.bind(make_sequence(0, min_tokens=1))
    assert state.edits(np.array([1, 0])).tolist() == [1]
    assert state.edits(np.array([1])).tolist() == []


def test_a_row_forgets_its_former_sequence():
    state = TokenState(num_rows=1, vocab=5)
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    state.bind(make_sequence(0, repetition_penalty=2.0, logit_bias={4: -3.0}, min_tokens=2, stop_ids=(3,)))
    found = state.edit(logits, torch.tensor([0]), torch.tensor([0]))
    assert found.tolist() == [[1.0, 1.0, 1.5, -math.inf, 2.0]]
    state.bind(make_sequence(0))
    assert state.edit(logits, torch.tensor([0]), torch.tensor([0])).tolist() == logits.tolist()
