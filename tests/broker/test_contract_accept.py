"""The broker's contract, a test for each line: how a request is accepted, and what a stream is."""

from __future__ import annotations

import pytest

from headrace.errors import (
    UnknownRequestError,
)
from headrace.messages import (
    Accepted,
    Ack,
    Attach,
    Done,
    Finish,
    StreamId,
    Submit,
    TokenRun,
    Tokens,
    pack_tokens,
)
from tests.broker.world import World, emit, finals, request, runs, text


@pytest.fixture
def world() -> World:
    return World()


def test_accept_names_the_seed_and_the_limits(world):
    world.group()
    client = world.client()
    given, drawn = client.submit(request(1, seed=77), request(2, seed=None, max_tokens=None))
    world.settle()
    assert (given.seed, given.max_tokens) == (77, 8)
    assert drawn.seed is not None
    assert drawn.max_tokens == 4096 - 3


def test_accept_a_request_sent_twice_runs_once(world):
    group, client = world.group(), world.client()
    (record, _) = client.submit(request(1), request(1))
    client.submit(request(1))
    world.finish([record])
    assert len(group.assigned) == 1
    assert len(finals(client)) == 1


def test_accept_the_same_id_attaches_to_the_running_answer(world):
    world.group()
    first, second = world.client("a"), world.client("b")
    first.submit(request(1, max_tokens=20))
    world.settle()
    world.step(5)
    (record,) = second.submit(request(1, max_tokens=20))
    world.finish([record])
    assert list(record.tokens[0]) == text(1, 0, 20)[0]
    assert not any(isinstance(message, Done) for message in first.said)


def test_accept_the_same_id_attaches_to_the_finished_answer(world):
    group, client = world.group(), world.client("a")
    world.run(client, request(1))
    world.now += 500
    again = world.client("b")
    (record,) = again.submit(request(1))
    world.settle()
    assert list(record.tokens[0]) == text(1, 0, 8)[0]
    assert record.reason == ["length"]
    assert len(group.assigned) == 1


def test_accept_a_resubmission_may_fill_in_what_the_acceptance_said(world):
    """A client that comes back names the seed and the limit it was told; that is the same request."""
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, seed=None, max_tokens=None))
    world.settle()
    client.submit(request(1, seed=record.seed, max_tokens=record.max_tokens))
    world.settle()
    assert client.conflicts == 0
    assert len(group.assigned) == 1


@pytest.mark.parametrize(
    "other", [{"prompt": (9,)}, {"max_tokens": 9}, {"seed": 2}, {"n": 2}, {"temperature": 0.5}], ids=str
)
@pytest.mark.parametrize("finished", [False, True])
def test_accept_the_same_id_with_another_body_is_a_conflict(world, other, finished):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1))
    world.settle()
    if finished:
        world.finish([record])
    client.send(Submit(requests=(request(1, **other),)))
    world.finish([record])
    assert client.conflicts == 1
    assert list(record.tokens[0]) == text(1, 0, 8)[0]
    assert len(group.assigned) == 1


def test_accept_an_id_is_idempotent_for_ten_minutes(world):
    group, client = world.group(), world.client()
    world.run(client, request(1))
    for _ in range(6):
        world.tick(99)
    world.run(client, request(1))
    assert len(group.assigned) == 1
    world.tick(9)
    client.records.clear()
    world.run(client, request(1, prompt=(5,)))
    assert len(group.assigned) == 2


def test_stream_every_token_is_named_by_request_choice_attempt_and_index(world):
    world.group()
    client = world.client()
    (record,) = world.run(client, request(1, n=2, max_tokens=3))
    assert {(run.request, run.attempt) for run in runs(client)} == {(record.request.id, 1)}
    indexes = [(run.choice, run.first + k) for run in runs(client) for k in range(len(run.tokens) // 4)]
    assert sorted(indexes) == [(choice, index) for choice in range(2) for index in range(3)]


def test_stream_every_accepted_request_ends_exactly_once(world):
    world.group()
    client = world.client()
    world.run(client, *(request(n, n=1 + n % 3, ignore_eos=False, max_tokens=60) for n in range(30)))
    ends = [(finish.request, finish.choice) for finish in finals(client)]
    assert len(ends) == len(set(ends)) == sum(1 + n % 3 for n in range(30))


def test_stream_repeats_from_a_leader_are_dropped_and_counted(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1))
    world.settle()
    world.step(3)
    stream = StreamId(record.request.id, 0, 1)
    again = pack_tokens(emit(1, 0, index) for index in range(3))
    group.send(Tokens(runs=(TokenRun(*stream, 0, again, None), TokenRun(*stream, 1, again[:4], None)), step=3))
    world.finish([record])
    assert world.broker.counters.stale_frames == 2
    assert record.attempt == [1]


def test_stream_a_gap_from_a_leader_makes_it_run_again(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1))
    world.settle()
    world.step(3)
    group.send(Tokens(runs=(TokenRun(record.request.id, 0, 1, 5, pack_tokens([1]), None),), step=4))
    world.finish([record])
    assert record.attempt == [2]
    assert list(record.tokens[0]) == text(1, 0, 8)[0]
    assert world.broker.counters.redispatch == {"gap": 1}


def test_stream_an_end_that_leaves_tokens_out_makes_it_run_again(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1))
    world.settle()
    world.step(3)
    group.send(Done(finishes=(Finish(record.request.id, 0, 1, "stop", 4, 0),)))
    world.finish([record])
    assert list(record.tokens[0]) == text(1, 0, 8)[0]


def test_stream_more_tokens_than_asked_for_are_cut(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, max_tokens=2))
    world.settle()
    many = pack_tokens(emit(1, 0, index) for index in range(5))
    group.send(Tokens(runs=(TokenRun(record.request.id, 0, 1, 0, many, None),), step=1))
    world.settle()
    assert list(record.tokens[0]) == text(1, 0, 2)[0]
    assert record.reason == ["length"]
    assert group.revoked == [StreamId(record.request.id, 0, 1)]


def test_stream_a_client_resumes_from_where_it_is(world):
    world.group()
    client = world.client()
    (record,) = client.submit(request(1))
    world.settle()
    world.step(6)
    client.said.clear()
    client.send(Attach(positions=(Ack(record.request.id, 0, 2, False),)))
    world.settle()
    assert [(run.first, len(run.tokens) // 4) for run in runs(client)] == [(2, 4)]


def test_accepted_comes_before_the_tokens(world):
    world.group()
    client = world.client()
    world.run(client, request(1))
    kinds = [type(message) for message in client.said if isinstance(message, Accepted | Tokens | Done)]
    assert kinds[0] is Accepted
    assert kinds[-1] is Done


def test_nobody_knows_an_id_that_was_never_submitted(world):
    world.group()
    client = world.client()
    (record,) = client.submit(request(1))
    world.settle()
    client.records[b"x" * 16] = other = type(record)(request(5))
    other.cancelled = True
    client.send(Attach(positions=(Ack(b"x" * 16, 0, 0, False),)))
    world.settle()
    assert isinstance(other.error, UnknownRequestError)
