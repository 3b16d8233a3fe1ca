"""The batch builder against a token-by-token restatement over random schedules; memory sizes and bad settings."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.kernels.batch import Batch
from headrace.messages import StreamId
from headrace.sampling import SamplingParams
from headrace.workers import memory
from headrace.workers.batch import BatchBuilder
from headrace.workers.config import EngineConfig
from headrace.workers.scheduler import Plan, Scheduler
from headrace.workers.sequence import Sequence

BLOCK = 4


def make_sequence(index: int, length: int, max_tokens: int) -> Sequence:
    tokens = array("I", [1000 * index + position for position in range(length)])
    stream = StreamId(index.to_bytes(16, "big"), 0, 0)
    return Sequence(stream, tokens, SamplingParams(), max_tokens=max_tokens)


def check(batch: Batch, plan: Plan) -> None:
    """Token by token what the batch must say."""
    token = 0
    ends = []
    for row, (sequence, count) in enumerate(plan.chunks):
        assert int(batch.query_starts[row]) == token
        for position in range(sequence.num_computed, sequence.num_computed + count):
            assert int(batch.token_ids[token]) == sequence.tokens[position]
            assert int(batch.positions[token]) == position
            block = sequence.blocks[position // BLOCK]
            assert int(batch.slots[token]) == block * BLOCK + position % BLOCK
            token += 1
        context = sequence.num_computed + count
        assert int(batch.context_lens[row]) == batch.context_lens_host[row] == context
        needed = -(-context // BLOCK)
        assert batch.block_tables[row, :needed].tolist() == sequence.blocks[:needed]
        if plan.chunks[row].samples:
            ends.append(token - 1)
    assert int(batch.query_starts[-1]) == token == len(batch.token_ids)
    assert batch.query_lens == tuple(chunk.num_tokens for chunk in plan.chunks)
    assert batch.num_decodes == sum(chunk.num_tokens == 1 for chunk in plan.chunks)
    each = list(range(len(batch.token_ids)))
    assert (each if batch.logits_rows is None else batch.logits_rows.tolist()) == ends
    assert batch.block_size == BLOCK
    # Kernels are compiled for what begins there; tensors that begin elsewhere would have others compiled while serving.
    parts = (batch.token_ids, batch.positions, batch.slots, batch.query_starts, batch.context_lens, batch.block_tables)
    assert not any(part.data_ptr() % 16 for part in parts)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(10, 40),
    st.integers(3, 40),
)
def test_a_batch_says_of_each_token_where_it_is(sizes, num_blocks, budget):
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=BLOCK, max_num_seqs=4, max_batch_tokens=budget, max_model_len=64
    )
    builder = BatchBuilder(num_rows=4, max_blocks=16, block_size=BLOCK, last_tokens=torch.zeros(5, dtype=torch.int64))
    for index, (length, max_tokens) in enumerate(sizes):
        if length + max_tokens <= scheduler.kv_tokens:
            scheduler.add(make_sequence(index, length, max_tokens))
    before = None
    while (plan := scheduler.schedule()).chunks:
        batch = builder.build(plan.chunks)
        check(batch, plan)
        if before is not None:
            assert torch.equal(*before), "the next step's batch lies over one that may not be computed yet"
        before = batch.slots, batch.slots.clone()
        sampling = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        scheduler.publish(scheduler.advance(plan))
        for sequence in sampling:
            if sequence.append(7) is not None:
                scheduler.remove(sequence)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_batch_tokens", -1),
        ("block_size", 1.5),
        ("block_size", True),
        ("kv_tokens", 0),
        ("kv_tokens", 15),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", True),
        ("gpu_memory_utilization", "0.9"),
        ("device", "tpu"),
        ("device", "cuda:x"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        EngineConfig(**{name: value})
    assert caught.value.param == name


def test_the_default_cache_takes_a_share_of_memory_and_no_more_than_is_of_use(monkeypatch):
    cpu = torch.device("cpu")
    sizes = {"block_size": 16, "max_model_len": 1024, "max_num_seqs": 4}
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 << 30)
    assert memory.default_kv_blocks(cpu, bytes_per_block=1 << 20, **sizes) == 4 * 64
    assert memory.default_kv_blocks(cpu, bytes_per_block=64 << 20, **sizes) == 16
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    assert memory.default_kv_blocks(cpu, bytes_per_block=1 << 20, **sizes) == 1


def test_available_memory_is_a_plausible_number():
    assert 1 << 20 < memory.available_bytes() < 1 << 50
