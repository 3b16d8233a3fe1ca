"""The scheduler as a pure machine: plans, preemption and admission, under random schedules and in single cases."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ContextLengthError
from headrace.messages import StreamId
from headrace.sampling import SamplingParams
from headrace.workers.scheduler import Filled, Plan, Scheduler
from headrace.workers.sequence import Sequence

VOCAB = 50


def next_token(history: array[int]) -> int:
    """A stand-in for a model: any function of the whole history will do."""
    return hashlib.blake2b(history.tobytes(), digest_size=4).digest()[0] % VOCAB


def undisturbed(prompt: list[int], max_tokens: int, stops: int = 0) -> list[int]:
    """The output of a model alone; tokens below `stops` end it."""
    history = array("I", prompt)
    while len(history) - len(prompt) < max_tokens and (token := next_token(history)) >= stops:
        history.append(token)
    return history[len(prompt) :].tolist()


def make_sequence(index: int, prompt: list[int], max_tokens: int, **options) -> Sequence:
    stream = StreamId(index.to_bytes(16, "big"), 0, 0)
    return Sequence(stream, array("I", prompt), SamplingParams(), max_tokens=max_tokens, **options)


def make_scheduler(num_blocks: int = 16, block_size: int = 4, **options) -> Scheduler:
    limits = {"max_num_seqs": 4, "max_batch_tokens": 16, "max_model_len": 64} | options
    return Scheduler(num_blocks=num_blocks, block_size=block_size, **limits)


@dataclass
class Machine:
    """A scheduler with a memory of token ids: what a step computes is read back through the block tables, so a block
    that is shared wrongly, or reused too early, changes the tokens. Tokens may be told up to `ahead` steps late, as a
    GPU does."""

    scheduler: Scheduler
    ahead: int = 0
    launched: deque[tuple[list[tuple[Sequence, int]], list[Filled]]] = field(default_factory=deque)
    last_tokens: dict[int, int] = field(default_factory=dict)  # by row, on the device
    memory: dict[int, int] = field(default_factory=dict)
    outputs: dict[bytes, list[int]] = field(default_factory=dict)
    plans: list[list[tuple[bytes, int]]] = field(default_factory=list)

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.scheduler.validate()

    def remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.scheduler.validate()

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self.scheduler.validate()
        self.check(plan)
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        # Like a kernel: first all K/V of the step is written, then everything is read.
        for sequence, count in plan.chunks:
            for position in range(sequence.num_computed, sequence.num_computed + count):
                known = position < sequence.num_tokens - sequence.num_expected
                token = sequence.tokens[position] if known else self.last_tokens[sequence.row]
                self.memory[self.slot(sequence, position)] = token
        chosen = [
            (seq, next_token(array("I", [self.memory[self.slot(seq, position)] for position in range(seq.num_tokens)])))
            for seq in sampling
        ]
        self.last_tokens |= {sequence.row: token for sequence, token in chosen}
        if plan.chunks:
            self.launched.append((chosen, self.scheduler.advance(plan)))
        for sequence in sampling:
            sequence.expect()
        while len(self.launched) > (self.ahead if plan.chunks else 0):
            self.read()
        self.plans.append([(chunk.sequence.stream.request, chunk.num_tokens) for chunk in plan.chunks])
        return plan

    def read(self) -> None:
        """The oldest step that was launched tells its tokens."""
        chosen, filled = self.launched.popleft()
        self.scheduler.publish(filled)
        held = list(self.scheduler)
        for sequence, token in chosen:
            if sequence in held and sequence.append(token):
                output = sequence.tokens[sequence.num_prompt :][: sequence.num_output]
                self.outputs[sequence.stream.request] = output.tolist()
                self.scheduler.remove(sequence)
        self.scheduler.validate()

    def slot(self, sequence: Sequence, position: int) -> int:
        size = self.scheduler.block_size
        return sequence.blocks[position // size] * size + position % size

    def check(self, plan: Plan) -> None:
        scheduler = self.scheduler
        counts = [chunk.num_tokens for chunk in plan.chunks]
        assert sum(counts) <= scheduler.max_batch_tokens
        assert len(counts) <= scheduler.max_num_seqs
        assert len({chunk.sequence.stream for chunk in plan.chunks}) == len(counts)
        singles = sum(count == 1 for count in counts)
        assert all(count == 1 for count in counts[:singles]), "single tokens come first"
        idle = not scheduler.num_running + scheduler.num_waiting
        assert plan.chunks or self.launched or idle, "work is left undone"
        for sequence, count in plan.chunks:
            assert 1 <= count <= sequence.num_pending
            assert len(sequence.blocks) * scheduler.block_size >= sequence.num_computed + count

    def run(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.step().chunks and not list(self.scheduler):
                return
        raise AssertionError("no end in sight")


@dataclass(frozen=True)
class Scenario:
    """A pool, some sequences, and at which step each is added or revoked."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    prefix_cache: bool
    requests: tuple[tuple[tuple[int, ...], int, int, int], ...]  # prompt, max_tokens, added at, revoked at or -1
    stops: int  # tokens below it end a text


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    num_blocks, block_size = draw(st.integers(2, 12)), draw(st.sampled_from([1, 2, 3, 4, 16]))
    room = num_blocks * block_size
    # Few different beginnings, so that prefixes are shared, parked and evicted all the time.
    beginnings = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=room), min_size=1, max_size=3))
    requests = []
    for _ in range(draw(st.integers(1, 10))):
        beginning = draw(st.sampled_from(beginnings))[: room - 1]
        prompt = (beginning + draw(st.lists(st.integers(0, 3), max_size=4)))[: room - 1]
        revoked = draw(st.one_of(st.just(-1), st.integers(0, 30)))
        max_tokens = draw(st.integers(1, room - len(prompt)))
        requests.append((tuple(prompt), max_tokens, draw(st.integers(0, 20)), revoked))
    return Scenario(
        num_blocks,
        block_size,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 40)),
        draw(st.booleans()),
        tuple(requests),
        draw(st.sampled_from([0, 2, 10])),
    )


def simulate(scenario: Scenario, ahead: int = 0) -> Machine:
    machine = Machine(
        make_scheduler(
            scenario.num_blocks,
            scenario.block_size,
            max_num_seqs=scenario.max_num_seqs,
            max_batch_tokens=scenario.max_batch_tokens,
            max_model_len=10_000,
            prefix_cache=scenario.prefix_cache,
        ),
        ahead,
    )
    stop_ids = tuple(range(scenario.stops))
    sequences = [make_sequence(i, list(req[0]), req[1], stop_ids=stop_ids) for i, req in enumerate(scenario.requests)]
    for step in range(32):
        for sequence, (_, _, added, revoked) in zip(sequences, scenario.requests, strict=True):
            if added == step:
                machine.add(sequence)
            if revoked == step and added <= step and sequence.stream.request not in machine.outputs:
                machine.remove(sequence)
        machine.step()
    machine.run()
    return machine


@pytest.mark.parametrize("ahead", [0, 1])
@settings(max_examples=300, deadline=None)
@given(scenario=scenarios())
def test_everything_ends_with_the_tokens_of_an_undisturbed_run(ahead: int, scenario: Scenario):
    machine = simulate(scenario, ahead)
    for index, (prompt, max_tokens, added, revoked) in enumerate(scenario.requests):
        output = machine.outputs.get(index.to_bytes(16, "big"))
        if output is None:
            assert revoked >= added, "lost without being revoked"
        else:
            assert output == undisturbed(list(prompt), max_tokens, scenario.stops)
    assert machine.scheduler.blocks.num_available == scenario.num_blocks


@settings(max_examples=50, deadline=None)
@given(scenarios())
def test_ranks_that_see_the_same_calls_make_the_same_plans(scenario: Scenario):
    assert simulate(scenario).plans == simulate(scenario).plans


def test_decodes_come_before_prompts_and_the_last_prompt_fills_the_budget():
    machine = Machine(make_scheduler(max_batch_tokens=10))
    machine.add(make_sequence(0, [1, 2, 3], 8))
    machine.step()
    machine.add(make_sequence(1, [5] * 6, 8))
    machine.add(make_sequence(2, [6] * 7, 8))
    machine.step()
    names = [(int.from_bytes(request, "big"), count) for request, count in machine.plans[-1]]
    assert names == [(0, 1), (1, 6), (2, 3)]
    machine.step()
    names = [(int.from_bytes(request, "big"), count) for request, count in machine.plans[-1]]
    assert names == [(0, 1), (1, 1), (2, 4)]


def test_a_prompt_longer_than_the_budget_is_read_in_chunks():
    machine = Machine(make_scheduler(max_batch_tokens=4))
    machine.add(make_sequence(0, [1] * 10, 2))
    machine.run()
    assert [count for plan in machine.plans for _, count in plan] == [4, 4, 2, 1]


def test_no_more_sequences_run_than_allowed():
    machine = Machine(make_scheduler(max_num_seqs=2))
    for index in range(5):
        machine.add(make_sequence(index, [index], 3))
    machine.step()
    assert (machine.scheduler.num_running, machine.scheduler.num_waiting) == (2, 3)
    machine.run()
    assert len(machine.outputs) == 5


def test_the_newest_yields_when_blocks_run_out_and_goes_on_later():
    machine = Machine(make_scheduler(num_blocks=4, block_size=4, prefix_cache=False))
    machine.add(make_sequence(0, [1, 2, 3], 12))
    machine.add(make_sequence(1, [4, 5, 6], 12))
    machine.run()
    assert machine.scheduler.stats.preemptions > 0
    first, second = (index.to_bytes(16, "big") for index in (0, 1))
    assert list(machine.outputs) == [first, second], "the older one ends first"
    assert machine.outputs[second] == undisturbed([4, 5, 6], 12)


def test_a_preempted_sequence_finds_its_blocks_in_the_cache():
    machine = Machine(make_scheduler(num_blocks=5, block_size=4))
    machine.add(make_sequence(0, [1, 2, 3], 13))
    machine.add(make_sequence(1, [4, 5, 6], 13))
    machine.run()
    assert machine.scheduler.stats.preemptions > 0
    assert machine.scheduler.stats.prefix_hits > 0


def test_equal_prompts_are_computed_once_even_when_they_arrive_together():
    machine = Machine(make_scheduler(num_blocks=32, max_batch_tokens=64))
    for index in range(4):
        machine.add(make_sequence(index, list(range(21)), 2))
    machine.run()
    # 21 tokens once, then one block is not shared: its last token is computed for the logits.
    assert sum(count for _, count in machine.plans[0]) == 21
    assert sorted(count for _, count in machine.plans[1]) == [1, 1, 1, 1]


def test_a_prompt_does_not_wait_for_a_small_shared_beginning():
    machine = Machine(make_scheduler(num_blocks=32, max_batch_tokens=64))
    machine.add(make_sequence(0, [7] * 4 + [1] * 12, 2))
    machine.add(make_sequence(1, [7] * 4 + [2] * 12, 2))
    assert len(machine.step().chunks) == 2


def test_caches_with_another_salt_share_nothing():
    plain, salted = (make_sequence(0, [1] * 9, 1) for _ in range(2))
    for salt, sequence in ((b"a", plain), (b"b", salted)):
        make_scheduler(salt=salt).add(sequence)
    plain, salted = (sequence.digests(2, 4) for sequence in (plain, salted))
    assert not set(plain) & set(salted)
    assert plain[0] != plain[1], "equal tokens at another depth are another block"


def test_prefixes_that_are_forgotten_are_not_found():
    """Not even the first block of a sequence that was running then, and is filled only afterwards."""
    machine = Machine(make_scheduler(num_blocks=32, block_size=4))
    machine.add(make_sequence(0, list(range(3)), 9))
    machine.step()
    machine.scheduler.forget_prefixes()
    machine.run()
    tokens = [*range(3), *machine.outputs[next(iter(machine.outputs))]]
    machine.add(make_sequence(1, tokens, 2))
    machine.run()
    assert machine.scheduler.stats.prefix_hits == 0
    machine.add(make_sequence(2, tokens, 2))
    machine.run()
    assert machine.scheduler.stats.prefix_hits > 0


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "param", "part"),
    [
        (60, 5, "max_tokens", "60 + 5 = 65"),
        (64, None, "prompt", "64 + 1 = 65"),
        (64, 1, "prompt", "the model's context holds 64"),
        (100, 1, "prompt", "100 + 1 = 101"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(num_prompt, max_tokens, param, part):
    scheduler = make_scheduler(max_model_len=64, num_blocks=32)
    with pytest.raises(ContextLengthError, match="Shorten the prompt") as caught:
        scheduler.resolve_max_tokens(num_prompt, max_tokens)
    assert part in caught.value.message
    assert caught.value.param == param


def test_what_just_fits_is_taken():
    scheduler = make_scheduler(max_model_len=64, num_blocks=32)
    assert scheduler.resolve_max_tokens(60, 4) == 4
    assert scheduler.resolve_max_tokens(60, None) == 4


def test_the_smaller_of_context_and_cache_is_the_limit():
    with pytest.raises(ContextLengthError, match="the KV cache holds 16"):
        make_scheduler(num_blocks=4, block_size=4).resolve_max_tokens(10, 7)


def test_a_sequence_that_fills_the_whole_cache_runs():
    machine = Machine(make_scheduler(num_blocks=4, block_size=4))
    machine.add(make_sequence(0, [1] * 10, 6))
    machine.add(make_sequence(1, [2] * 10, 6))
    machine.run()
    assert all(len(output) == 6 for output in machine.outputs.values())


def test_deadlines_are_found_among_running_and_waiting():
    scheduler = make_scheduler(max_num_seqs=1)
    for index, deadline in enumerate([5.0, None, 3.0, 9.0]):
        scheduler.add(make_sequence(index, [index], 8, deadline=deadline))
    scheduler.schedule()
    assert scheduler.expired(2.9) == []
    late = scheduler.expired(5.0)
    assert [seq.deadline for seq in late] == [5.0, 3.0]
    for sequence in late:
        scheduler.remove(sequence)
    assert scheduler.expired(8.9) == []
    assert [seq.deadline for seq in scheduler.expired(9.0)] == [9.0]


def test_a_stop_token_ends_a_sequence_without_being_part_of_it():
    sequence = Sequence(
        StreamId(b"x", 0, 0), array("I", [1]), SamplingParams(min_tokens=1), max_tokens=3, stop_ids=(9,)
    )
    assert sequence.append(9) is None, "held back until min_tokens"
    assert sequence.append(9) == "stop"
    assert sequence.tokens.tolist() == [1, 9]
    assert sequence.append(2) is None
    assert sequence.append(2) == "length"


# ------------------------------------------------------------------------------------------ sources for an encoder


def make_sourced(index: int, source: int, max_tokens: int) -> Sequence:
    return make_sequence(index, [7], max_tokens, source=array("I", range(source)))


def test_a_source_is_encoded_once_in_the_step_in_which_its_sequence_enters():
    scheduler = make_scheduler(max_batch_tokens=8, prefix_cache=False)
    first, second = make_sourced(1, 5, 3), make_sourced(2, 6, 3)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    scheduler.validate()
    assert plan.encodes == (first,)
    assert [chunk.sequence for chunk in plan.chunks] == [first]
    assert plan.num_tokens == 6
    assert len(first.source_blocks) == 2
    scheduler.publish(scheduler.advance(plan))
    first.append(1)
    plan = scheduler.schedule()
    assert plan.encodes == (second,)
    assert [chunk.sequence for chunk in plan.chunks] == [first, second]


def test_a_source_beyond_the_budget_is_encoded_alone():
    scheduler = make_scheduler(max_batch_tokens=4, prefix_cache=False)
    small, large = make_sourced(1, 3, 1), make_sourced(2, 20, 1)
    scheduler.add(small)
    scheduler.add(large)
    plan = scheduler.schedule()
    assert plan.encodes == (small,)
    scheduler.publish(scheduler.advance(plan))
    assert small.append(1) == "length"
    scheduler.remove(small)
    assert scheduler.schedule().encodes == (large,)


def test_a_preempted_sequence_gives_up_its_source_and_encodes_it_again():
    scheduler = make_scheduler(num_blocks=6, prefix_cache=False)
    old, new = make_sourced(1, 8, 12), make_sourced(2, 4, 8)
    scheduler.add(old)
    scheduler.add(new)
    seen: list[Sequence] = []
    for _ in range(40):
        plan = scheduler.schedule()
        scheduler.validate()
        seen += plan.encodes
        scheduler.publish(scheduler.advance(plan))
        for sequence in [chunk.sequence for chunk in plan.chunks if chunk.sequence.num_pending == 0]:
            if sequence.append(1) is not None:
                scheduler.remove(sequence)
        scheduler.validate()
    assert seen.count(old) == 1
    assert seen.count(new) == 2
    assert scheduler.stats.preemptions == 1
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.blocks.num_available == 6


def test_a_source_counts_in_whole_blocks():
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    assert scheduler.resolve_max_tokens(1, None, num_source=5) == 16 - 8 - 1
    with pytest.raises(ContextLengthError):
        scheduler.resolve_max_tokens(1, 8, num_source=5)
