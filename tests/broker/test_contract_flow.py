"""The broker's contract, a test for each line: what a slow reader gets, and what it must not cost the others."""

from __future__ import annotations

import pytest

from headrace.errors import (
    SlowConsumerError,
)
from tests.broker.world import World, request, runs, text


@pytest.fixture
def world() -> World:
    return World()


def test_flow_a_slow_reader_gets_longer_runs_and_loses_nothing():
    world = World(window_bytes=40)
    world.group()
    client = world.client()
    client.acks = False
    (record,) = client.submit(request(1, max_tokens=50))
    world.settle()
    world.step(60)
    assert len(record.tokens[0]) == 10
    assert record.reason == [None]
    client.acks = True
    client.confirm(record)
    world.settle()
    assert list(record.tokens[0]) == text(1, 0, 50)[0]
    assert max(len(run.tokens) // 4 for run in runs(client)) == 10
    assert world.broker.counters.stream_stalls >= 1


def test_flow_a_slow_reader_does_not_hold_up_the_batch():
    world = World(window_bytes=40)
    group, slow, fast = world.group(), world.client("slow"), world.client("fast")
    slow.acks = False
    slow.submit(request(1, max_tokens=50))
    (record,) = fast.submit(request(2, max_tokens=50))
    world.settle()
    world.step(50)
    assert record.ended
    assert group.steps == 50


def test_flow_a_reader_that_stopped_is_cancelled_with_a_final_error():
    world = World(window_bytes=40, stall_timeout=60.0)
    group, client = world.group(), world.client()
    client.acks = False
    (record,) = client.submit(request(1, max_tokens=4000))
    world.settle()
    world.step(20)
    world.wait(58.0)
    assert record.error is None
    world.wait(5.0)
    assert isinstance(record.error, SlowConsumerError)
    assert not group.rows
    assert world.broker.counters.cancelled == {"slow_consumer": 1}


def test_flow_one_token_a_second_is_slow_but_alive():
    """Its answer was complete long ago; it must not be forgotten while somebody reads it."""
    world = World(window_bytes=8, stall_timeout=60.0, idempotency_window=30.0, max_finished=1)
    world.group()
    client, busy = world.client("slow"), world.client("busy")
    (record,) = client.submit(request(1, max_tokens=100))
    client.acks = False
    world.settle()
    world.step(110)
    world.run(busy, *(request(n) for n in range(2, 8)))
    for _ in range(100):
        world.tick(1.0)
        client.confirm(record)
        world.settle()
    assert list(record.tokens[0]) == text(1, 0, 100)[0]
    assert record.reason == ["length"]


def test_flow_an_answer_larger_than_the_store_still_reaches_its_reader():
    world = World(window_bytes=400, max_finished_bytes=100)
    world.group()
    client = world.client()
    (record,) = world.run(client, request(1, max_tokens=500))
    assert list(record.tokens[0]) == text(1, 0, 500)[0]


def test_flow_a_reader_that_stopped_after_the_answer_was_complete_is_told():
    """The rest of an answer once went without a word when its reader fell behind after the last token."""
    world = World(window_bytes=40, stall_timeout=60.0)
    group, client = world.group(), world.client()
    client.acks = False
    (record,) = client.submit(request(1, max_tokens=30))
    world.settle()
    world.step(30)
    world.wait(62.0)
    assert isinstance(record.error, SlowConsumerError)
    again = world.client("again")
    (whole,) = again.submit(request(1, max_tokens=30))
    world.settle()
    assert list(whole.tokens[0]) == text(1, 0, 30)[0]
    assert len(group.assigned) == 1


def test_flow_a_pause_of_the_broker_is_nobodys_fault():
    world = World(window_bytes=40, stall_timeout=60.0)
    group, client = world.group(), world.client()
    client.acks = False
    (record,) = client.submit(request(1, max_tokens=100))
    world.settle()
    world.step(20)
    world.tick(1.0)
    world.tick(300.0)
    assert record.error is None
    assert group.resets == 0
    client.acks = True
    client.confirm(record)
    world.finish([record])
    assert record.error is None


def test_flow_a_group_never_gets_more_streams_than_it_has_rows(world):
    group, client = world.group(rows=3), world.client()
    records = client.submit(*(request(n, n=2) for n in range(1, 9)))
    world.settle()
    assert len(group.rows) == 3
    world.finish(records)


@pytest.mark.parametrize("how", ["it fails", "it moves to another client"])
def test_flow_what_ends_makes_room_for_what_waits(how):
    """Tokens that were under way when their request ended held the window shut, until something else was said."""
    world = World(window_bytes=40, stall_timeout=60.0)
    world.group()
    client, other = world.client("c"), world.client("other")
    client.acks = False
    client.submit(request(1, max_tokens=4000, budget_ms=3000))
    world.settle()
    world.step(10)
    (second,) = client.submit(request(2, max_tokens=4))
    world.settle()
    world.step(4)
    assert not second.tokens[0]
    if how == "it fails":
        world.wait(3.5)
    else:
        other.submit(request(1, max_tokens=4000, budget_ms=3000))
        world.settle()
    assert list(second.tokens[0]) == text(2, 0, 4)[0]
    assert second.reason == ["length"]
