"""The broker's contract, a test for each line: cancelled requests, clients that go and come back, groups that leave."""

from __future__ import annotations

import pytest

from headrace.errors import (
    RequestCancelledError,
    UnavailableError,
)
from headrace.messages import (
    Cancel,
    Revoke,
    StreamId,
)
from tests.broker.world import World, finals, request


@pytest.fixture
def world() -> World:
    return World()


def test_cancel_is_acknowledged_and_frees_the_row_at_once(world):
    group, client = world.group(rows=1), world.client()
    first, second = client.submit(request(1, max_tokens=4000), request(2))
    world.settle()
    world.step(5)
    client.cancel(first)
    world.settle()
    assert first.reason == ["cancelled"]
    assert len(first.tokens[0]) == 5
    assert group.revoked == [StreamId(first.request.id, 0, 1)]
    assert [assignment.request for assignment in group.assigned][-1] == second.request.id


def test_cancel_can_be_repeated_and_unknown_ids_are_ignored(world):
    world.group()
    client = world.client()
    (record,) = client.submit(request(1))
    world.settle()
    client.cancel(record)
    client.cancel(record)
    client.send(Cancel(requests=(b"nobody knows it!", b"")))
    world.settle()
    assert len(finals(client)) == 1
    assert world.broker.counters.cancelled == {"client": 1}


def test_cancel_in_the_queue_and_before_a_model_is_there(world):
    client = world.client()
    (parked,) = client.submit(request(1))
    world.settle()
    client.cancel(parked)
    world.settle()
    assert isinstance(parked.error, RequestCancelledError)
    group = world.group(rows=1)
    _, queued = client.submit(request(2, max_tokens=100), request(3))
    world.settle()
    client.cancel(queued)
    world.settle()
    assert queued.reason == ["cancelled"]
    assert len(group.assigned) == 1


def test_cancel_of_a_stream_that_nobody_reads_is_acknowledged_too(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, max_tokens=100))
    world.settle()
    client.reconnect()
    world.broker.delivery.disconnect(world.broker.delivery.connections[b"c#2"], world.now)
    client.cancel(record)
    world.settle()
    assert isinstance(record.error, RequestCancelledError)
    assert not group.rows


def test_cancel_happens_when_the_client_is_gone(world):
    group, client = world.group(), world.client()
    client.submit(request(1, max_tokens=4000))
    world.settle()
    world.clients.pop(client.peer)
    world.step()
    assert group.rows
    world.wait(2.5)
    assert not group.rows
    assert world.broker.counters.cancelled == {"disconnect": 1}
    assert world.broker.report(world.now)["requests"] == {"live": 0, "finished": 0}


def test_cancel_happens_when_the_client_fell_silent(world):
    group, client = world.group(), world.client()
    client.submit(request(1, max_tokens=4000))
    world.settle()
    client.silent = True
    world.wait(20.0)
    assert not group.rows


def test_a_client_that_comes_back_in_time_loses_nothing(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, max_tokens=50))
    world.settle()
    world.step(5)
    client.reconnect()
    world.finish([record])
    assert record.attempt == [1]
    assert len(group.assigned) == 1


def test_a_client_that_comes_back_too_late_submits_again_with_what_it_holds(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, max_tokens=50))
    world.settle()
    world.step(5)
    peer = client.peer
    world.clients.pop(peer)
    world.step()
    world.wait(3.0)
    world.clients[peer] = client
    client.reconnect()
    world.finish([record])
    assert record.attempt == [2]  # the number goes on, so that output of the first run stays late
    assert len(group.assigned[1].output) == 20


def test_drain_hands_the_rest_to_another_group_and_blames_nobody(world):
    leaving, client = world.group("g0"), world.client()
    records = client.submit(*(request(n, max_tokens=30) for n in range(1, 5)))
    world.settle()
    world.step(5)
    other = world.group("g1")
    leaving.beat(draining=1)
    late = client.submit(request(9, max_tokens=30))
    world.settle()
    world.step(5)
    assert [assignment.request for assignment in other.assigned] == [late[0].request.id]
    leaving.drain()
    world.settle()
    world.finish([*records, *late])
    assert {len(assignment.output) // 4 for assignment in other.assigned[1:]} == {10}
    assert all(record.error is None for record in records)
    streams = world.broker.counters.redispatch
    assert streams == {"drained": 4}


def test_drain_by_refusal_is_no_fault_of_the_request(world):
    leaving, client = world.group("g0"), world.client()
    leaving.refuse_with = UnavailableError("going")
    (record,) = client.submit(request(1))
    world.settle()
    other = world.group("g1")
    world.finish([record])
    assert len(leaving.assigned) == 1
    assert len(other.assigned) == 1


def test_revoke_comes_before_what_takes_its_place(world):
    group, client = world.group(rows=1), world.client()
    first, _ = client.submit(request(1, max_tokens=100), request(2))
    world.settle()
    order: list[str] = []
    take = group._take
    group._take = lambda message: (order.append(type(message).__name__), take(message))
    client.cancel(first)
    world.settle()
    assert order == [Revoke.__name__, "Assign"]
