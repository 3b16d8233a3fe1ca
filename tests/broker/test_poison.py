"""The broker's contract, a test for each line: requests that take their group down, and those that were only near."""

from __future__ import annotations

import itertools

import pytest

from headrace.errors import WorkerCrashedError
from tests.broker.world import World, request, text

POISON = 250


def kills_at(index: int):
    """Groups die when a prompt with the poison in it gets to this token."""
    return lambda assignment, at: assignment.prompt[0] == POISON and at >= index


def innocents(client, count: int, **settings):
    return client.submit(*(request(n, prompt=(n % 200, 1), **settings) for n in range(1, count + 1)))


@pytest.mark.parametrize("index", [0, 3, 20])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_poisonous_request_among_32_innocents(index, groups):
    world = World(max_queued_requests=200)
    for n in range(groups):
        world.group(f"g{n}", rows=64, kills=kills_at(index))
    client = world.client()
    good = innocents(client, 16, max_tokens=40)
    (poison,) = client.submit(request(999, prompt=(POISON,), max_tokens=60))
    good += client.submit(*(request(n, prompt=(n % 200, 1), max_tokens=40) for n in range(17, 33)))
    world.finish([*good, poison])
    assert all(record.error is None for record in good)
    assert [list(record.tokens[0]) for record in good] == [text(n, 0, 40)[0] for n in range(1, 33)]
    assert isinstance(poison.error, WorkerCrashedError)
    assert not poison.error.retryable
    assert sum(group.deaths for group in world.groups) <= (2 if index < 8 else 3)
    assert world.broker.counters.quarantined == 1


def test_a_quarantined_content_is_refused_without_touching_a_group_for_an_hour():
    world = World()
    group = world.group(kills=kills_at(0))
    client = world.client()
    world.run(client, request(1, prompt=(POISON,)))
    deaths, assigned = group.deaths, len(group.assigned)
    records = client.submit(request(2, prompt=(POISON,)), request(3, prompt=(POISON,), seed=None))
    (other,) = client.submit(request(4, prompt=(POISON - 1,)))
    world.finish([*records, other])
    assert all(isinstance(record.error, WorkerCrashedError) for record in records)
    assert other.error is None
    assert group.deaths == deaths
    assert len(group.assigned) == assigned + 1
    for _ in range(37):
        world.tick(99.0)
    (again,) = client.submit(request(5, prompt=(POISON,)))
    world.settle()
    assert len(group.assigned) == assigned + 2
    assert again.error is None


def test_the_same_id_gets_the_same_verdict():
    world = World()
    world.group(kills=kills_at(0))
    client = world.client()
    world.run(client, request(1, prompt=(POISON,)))
    client.records.clear()
    (again,) = world.run(client, request(1, prompt=(POISON,)))
    assert isinstance(again.error, WorkerCrashedError)


def test_a_suspect_is_the_only_unproven_stream_of_its_group():
    world = World()
    first = world.group("g0", rows=16)
    client = world.client()
    records = innocents(client, 6, max_tokens=30)
    world.settle()
    world.step(2)
    first.die()
    world.wait(4.5)
    second = world.group("g1", rows=16)
    aboard = []
    for _ in range(20):
        aboard.append(len(second.rows))
        world.step()
    assert aboard[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(aboard))
    world.finish(records)


def test_streams_that_ran_for_long_rejoin_the_batch_at_once():
    world = World()
    first = world.group("g0", rows=16)
    client = world.client()
    records = innocents(client, 6, max_tokens=30)
    world.settle()
    world.step(9)
    first.die()
    world.wait(4.5)
    second = world.group("g1", rows=16)
    assert len(second.rows) == 6
    world.finish(records)


def test_two_deaths_make_a_suspect_of_anybody():
    world = World()
    client = world.client()
    records = innocents(client, 3, max_tokens=60)
    for n in range(2):
        group = world.group(f"g{n}", rows=16)
        world.step(10)
        group.die()
        world.wait(4.5)
    third = world.group("g2", rows=16)
    assert len(third.rows) == 1
    world.finish(records)
    assert all(record.error is None for record in records)


def test_newcomers_are_kept_apart_from_a_suspect():
    world = World()
    client = world.client()
    first = world.group("g0", rows=16)
    (suspect,) = client.submit(request(1, max_tokens=30))
    world.settle()
    world.step(1)
    first.die()
    world.wait(4.5)
    second = world.group("g1", rows=16)
    (fresh,) = client.submit(request(2, max_tokens=30))
    world.settle()
    assert [assignment.request for assignment in second.assigned] == [suspect.request.id]
    world.step(10)
    assert len(second.assigned) == 2
    world.finish([suspect, fresh])


def test_a_retry_budget_ends_what_loses_its_group_again_and_again():
    world = World(max_redispatch=2)
    client = world.client()
    (record,) = client.submit(request(1, max_tokens=400))
    for n in range(3):
        group = world.group(f"g{n}")
        world.step(70)
        assert record.error is None
        group.die()
        world.wait(4.5)
    assert isinstance(record.error, WorkerCrashedError)
    assert "3 times" in record.error.message
    assert not record.error.retryable
    assert len(record.tokens[0]) > 0


def test_neighbours_of_the_guilty_pay_nothing_from_their_budget():
    world = World(max_redispatch=1)
    group = world.group(kills=kills_at(2))
    client = world.client()
    good, poison = client.submit(request(1, max_tokens=60), request(9, prompt=(POISON,)))
    world.settle()
    world.step(3)
    assert group.deaths == 1  # one redispatch for both: there is no more in the budget
    world.finish([poison, good])
    assert group.deaths == 2
    assert isinstance(poison.error, WorkerCrashedError)
    assert good.error is None
    assert good.attempt == [3]


def test_a_group_that_says_hello_again_after_a_reset_did_not_crash():
    world = World()
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, max_tokens=60))
    world.settle()
    for _ in range(4):
        world.step(2)
        world.broker._leaders.give_up(world.broker.registry.by_peer[group.peer], "test", "why", world.now, blame=False)
        world.settle()
    world.finish([record])
    assert record.error is None


def test_a_new_process_under_the_same_name_means_that_the_old_one_died():
    world = World()
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1, max_tokens=30))
    world.settle()
    world.step(2)
    group.die()
    group.start()
    world.settle()
    assert world.broker.counters.redispatch == {"replaced": 1}
    (stream,) = world.broker.jobs.live[record.request.id].streams
    assert stream.marks == 1
    world.finish([record])


def test_the_same_process_on_a_new_connection_did_not_die():
    world = World()
    group, client = world.group(life="one"), world.client()
    (record,) = client.submit(request(1, max_tokens=30))
    world.settle()
    world.step(2)
    group.peer = world.new_peer("g0")
    group.hello()
    world.settle()
    (stream,) = world.broker.jobs.live[record.request.id].streams
    assert (stream.marks, stream.redispatches, stream.attempt) == (0, 0, 2)
    world.finish([record])


def test_the_quarantine_is_bounded():
    from headrace.broker.replays import Quarantine

    quarantine = Quarantine(10.0)
    for n in range(2000):
        quarantine.add(n.to_bytes(36), 0.0)
    assert len(quarantine) == 1024
    assert not quarantine.holds((0).to_bytes(36), 1.0)
    assert quarantine.holds((1999).to_bytes(36), 9.0)
    assert not quarantine.holds((1999).to_bytes(36), 10.0)
    assert len(quarantine) == 1023
