"""The waiting room: requests that came before a group of their model did."""

from __future__ import annotations

from headrace.errors import (
    DeadlineExceededError,
    OverloadedError,
    UnavailableError,
)
from headrace.messages import Drained, Request, Submit, pack_tokens
from tests.broker.world import World, card, request

BIG = tuple(range(1, 101))


def refused(world, client, *requests):
    """Submit what must be refused; the errors."""
    records = client.submit(*requests)
    world.settle()
    assert all(record.error is not None for record in records)
    return [record.error for record in records]


# -------------------------------------------------------------------------------------------------- no group


def test_requests_wait_for_the_first_group_and_then_run():
    world = World()
    client = world.client()
    records = client.submit(request(1), request(2, model=""))
    world.settle()
    world.wait(5.0)
    assert world.broker.report(world.now)["queue"]["parked"] == 2
    world.group()
    world.finish(records)
    assert all(record.error is None for record in records)


def test_requests_without_a_group_are_refused_after_a_while_and_may_come_back():
    world = World(unavailable_after=15.0)
    client = world.client()
    (record,) = client.submit(request(1))
    world.settle()
    world.wait(16.0)
    assert isinstance(record.error, UnavailableError)
    assert record.error.retry_after > 0
    assert world.broker.report(world.now)["queue"]["parked"] == 0


def test_bad_values_are_refused_before_there_is_a_model():
    world = World()
    client = world.client()
    (error,) = refused(world, client, request(1, temperature=-1.0))
    assert error.param == "temperature"


def test_a_waiting_id_with_another_body_is_a_conflict():
    world = World()
    client = world.client()
    (record,) = client.submit(request(1))
    client.send(Submit(requests=(request(1, prompt=(9,)),)))
    client.submit(request(1))
    world.group()
    world.finish([record])
    assert client.conflicts == 1


def test_time_runs_while_a_request_waits_for_a_model():
    """The budget once began anew when the model appeared."""
    world = World()
    client = world.client()
    short, long = client.submit(request(1, budget_ms=3000), request(2, budget_ms=9000))
    world.settle()
    world.wait(4.0)
    assert isinstance(short.error, DeadlineExceededError)
    group = world.group()
    assert 4000 < group.assigned[0].budget_ms <= 5000
    world.finish([long])


def test_the_waiting_room_is_bounded_in_requests_shares_and_bytes():
    world = World(max_queued_requests=8, client_share=0.5)
    one, two, three = world.client("1"), world.client("2"), world.client("3")
    assert sum(r.error is None for r in _settled(world, one, range(1, 7))) == 4
    assert sum(r.error is None for r in _settled(world, two, range(11, 17))) == 4
    errors = [r.error for r in _settled(world, three, range(21, 22))]
    assert isinstance(errors[0], OverloadedError)
    world.clients.pop(one.peer)
    world.broker.delivery.connections[one.peer].heard_at = -1000.0
    world.tick()
    assert world.broker.report(world.now)["queue"]["parked"] == 4


def _settled(world, client, numbers):
    records = client.submit(*(request(n) for n in numbers))
    world.settle()
    return records


def test_the_waiting_room_does_not_keep_gigabytes():
    """Without a model there is no limit in tokens, so there is one in bytes."""
    world = World()
    client = world.client()
    huge = pack_tokens(range(2_000_000))
    records = []
    for number in range(1, 12):
        one = Request(id=number.to_bytes(16), model="m", prompt=huge, sampling={"max_tokens": 1})
        records += client.submit(one)
        world.settle()
    assert sum(record.error is None for record in records) == 8
    assert isinstance(records[-1].error, OverloadedError)


def test_a_model_whose_groups_are_gone_is_waited_for_then_refused():
    world = World(unavailable_after=15.0)
    group, client = world.group(), world.client()
    group.send(Drained())
    group.alive = False
    (waiting,) = client.submit(request(1))
    world.wait(10.0)
    assert waiting.error is None
    world.wait(6.0)
    assert isinstance(waiting.error, UnavailableError)
    (error,) = refused(world, client, request(2))
    assert isinstance(error, UnavailableError)
    group.start()
    (fine,) = world.run(client, request(3))
    assert fine.error is None


def test_several_models_have_to_be_named():
    world = World()
    world.group("g0", model=card("a"))
    world.group("g1", model=card("b"))
    client = world.client()
    (error,) = refused(world, client, request(1, model=""))
    assert error.param == "model"
    assert "a, b" in error.message
