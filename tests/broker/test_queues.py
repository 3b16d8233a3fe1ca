"""The queue of a model: order, fairness, and nothing lost or counted twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.broker.queues import FairQueue
from headrace.broker.requests import Job, Stream
from headrace.messages import pack_tokens


def stream(number: int = 1, *, owner: bytes = b"c", tokens: int = 3, output: int = 0) -> Stream:
    job = Job(
        id=number.to_bytes(16),
        model="m",
        prompt=pack_tokens(range(tokens)),
        sampling={"seed": 1, "max_tokens": 8},
        digest=b"",
        stops=frozenset(),
        deadline=None,
        owner=owner,
        now=0.0,
    )
    job.streams = [Stream(job, 0, 0, pack_tokens(range(output)), "f" if output else "")]
    return job.streams[0]


def drain(queue: FairQueue) -> list[Stream]:
    popped = []
    while (each := queue.pop()) is not None:
        queue.validate()
        popped.append(each)
    return popped


def test_one_connection_is_served_in_order():
    queue, streams = FairQueue(), [stream(n) for n in range(5)]
    for each in streams:
        queue.push(each)
    assert len(queue) == 5
    assert queue.tokens == 15
    assert queue.waiting_for(b"c") == 5
    assert drain(queue) == streams
    assert queue.tokens == 0
    assert not queue


def test_connections_take_turns():
    queue = FairQueue()
    many = [stream(n, owner=b"many") for n in range(4)]
    few = [stream(10 + n, owner=b"few") for n in range(2)]
    for each in (*many, *few):
        queue.push(each)
    assert drain(queue) == [many[0], few[0], many[1], few[1], many[2], many[3]]


def test_what_ran_before_goes_first_and_keeps_its_order():
    queue, waiting = FairQueue(), stream(1)
    again = [stream(2, output=1), stream(3, output=1)]
    later = [stream(4, output=1)]
    queue.push(waiting)
    queue.push_front(again)
    queue.push_front(later)
    assert drain(queue) == [*later, *again, waiting]


def test_suspects_have_a_part_of_their_own_that_is_not_popped():
    queue, suspect = FairQueue(), stream(1, output=1)
    suspect.probation = 8
    queue.push_front([suspect])
    assert queue.pop() is None
    assert list(queue.suspects) == [suspect]
    assert len(queue) == 1
    queue.remove(suspect)
    assert not queue


def test_what_was_popped_in_vain_goes_back_where_it_was():
    """A stream that no group can hold once moved to the front, ahead of everybody and out of its owner's share."""
    queue = FairQueue()
    fresh, again, other = stream(1), stream(2, output=1), stream(3)
    queue.push(fresh)
    queue.push(other)
    queue.push_front([again])
    popped = [queue.pop(), queue.pop()]
    assert popped == [again, fresh]
    queue.put_back(popped)
    queue.validate()
    assert queue.waiting_for(b"c") == 2
    assert drain(queue) == [again, fresh, other]


@given(st.lists(st.tuples(st.sampled_from(["push", "front", "pop", "remove"]), st.integers(0, 3)), max_size=60))
def test_nothing_is_lost_or_counted_twice(steps):
    queue, present, popped = FairQueue(), [], []
    for number, (what, owner) in enumerate(steps):
        each = stream(number, owner=bytes([owner]), tokens=owner + 1, output=what == "front")
        if what == "push":
            queue.push(each)
            present.append(each)
        elif what == "front":
            queue.push_front([each])
            present.append(each)
        elif what == "pop":
            found = queue.pop()
            assert (found is None) == (not present)
            if found is not None:
                present.remove(found)
                popped.append(found)
        elif present:
            queue.remove(present.pop(owner % len(present)))
        queue.validate()
        assert len(queue) == len(present)
        assert set(queue) == set(present)
    assert all(each.lane is None for each in popped)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_no_connection_waits_longer_than_a_round(owners):
    """Between two turns of a connection that waits, each other one is served at most once."""
    queue = FairQueue()
    for number, owner in enumerate(owners):
        queue.push(stream(number, owner=bytes([owner])))
    order = [each.job.owner for each in drain(queue)]
    for owner in set(order):
        turns = [index for index, each in enumerate(order) if each == owner]
        for before, after in zip([-1, *turns], turns, strict=False):
            between = order[before + 1 : after]
            assert len(between) == len(set(between))
