"""The broker's contract, a test for each line: how a stream goes on elsewhere, and who is not listened to any more."""

from __future__ import annotations

import pytest

from headrace.broker.events import Face, Malformed
from headrace.errors import (
    ModelChangedError,
)
from headrace.messages import (
    StreamId,
    TokenRun,
    Tokens,
    pack_tokens,
)
from tests.broker.world import World, card, request, text


@pytest.fixture
def world() -> World:
    return World()


def test_resume_continues_in_front_with_the_tokens_as_output(world):
    first = world.group("g0", rows=2)
    client = world.client()
    running = client.submit(request(1, max_tokens=30), request(2, max_tokens=30))
    waiting = client.submit(*(request(n) for n in range(3, 6)))
    world.settle()
    world.step(10)
    first.die()
    world.wait(4.5)
    second = world.group("g1", rows=2)
    assert [(a.request, a.attempt, len(a.output) // 4) for a in second.assigned] == [
        (record.request.id, 2, 10) for record in running
    ]
    world.finish([*running, *waiting])
    assert all(record.error is None for record in running)
    assert world.broker.counters.resumed_tokens == 20


def test_resume_keeps_the_seed_of_the_acceptance(world):
    first, client = world.group("g0"), world.client()
    (record,) = client.submit(request(1, seed=None))
    world.settle()
    world.step(2)
    first.die()
    second = world.group("g1")
    world.finish([record])
    assert {a.sampling["seed"] for a in first.assigned + second.assigned} == {record.seed}
    assert list(record.tokens[0]) == text(record.seed, 0, 8)[0]


def test_resume_does_not_compute_logprobs_again(world):
    first, client = world.group("g0"), world.client()
    (record,) = client.submit(request(1, logprobs=2))
    world.settle()
    world.step(4)
    first.die()
    second = world.group("g1")
    world.finish([record])
    assert len(second.assigned[0].output) == 16
    assert [probs[1][0][0] for probs in record.logprobs[0]] == list(record.tokens[0])


def test_resume_each_choice_is_a_stream_of_its_own(world):
    first, client = world.group("g0", rows=3), world.client()
    (record,) = client.submit(request(1, n=3, max_tokens=12))
    world.settle()
    world.step(4)
    first.send(Tokens(runs=(TokenRun(record.request.id, 1, 1, 11, pack_tokens([1]), None),)))  # only choice 1 stumbles
    world.settle()
    world.finish([record])
    assert record.attempt == [1, 2, 1]
    assert [list(tokens) for tokens in record.tokens] == [text(1, choice, 12)[0] for choice in range(3)]


def test_resume_happens_under_the_same_fingerprint_only(world):
    old, client = world.group("g0"), world.client()
    begun, fresh = client.submit(request(1), request(2))
    world.settle()
    old.rows.pop(StreamId(fresh.request.id, 0, 1))
    world.step(3)
    old.die()
    world.group("g1", model=card(fingerprint="f1"))
    world.wait(4.5)
    world.tick()
    assert isinstance(begun.error, ModelChangedError)
    world.finish([fresh])
    assert list(fresh.tokens[0]) == text(2, 0, 8)[0]


def test_resume_waits_for_a_group_with_the_right_fingerprint_if_there_is_one(world):
    old = world.group("g0", rows=1)
    also_old = world.group("g1", rows=1)
    client = world.client()
    begun = client.submit(request(1, max_tokens=30), request(2, max_tokens=30))
    world.settle()
    world.step(5)
    world.group("g2", model=card(fingerprint="f1"))
    old.die()
    world.wait(4.5)
    world.step(40)
    world.finish(begun)
    assert all(record.error is None for record in begun)
    assert len(also_old.assigned) >= 2


def test_resume_after_the_last_token_needs_no_group(world):
    """A group that dies between the last token and its Done has finished the stream all the same."""
    group, client = world.group(), world.client()
    (by_length, by_stop) = client.submit(request(1, max_tokens=4), request(3, max_tokens=4000, ignore_eos=False))
    whole, _ = text(3, 0, 4000, ignore_eos=False)
    world.settle()
    for record, tokens in ((by_length, text(1, 0, 4)[0]), (by_stop, whole)):
        group.send(Tokens(runs=(TokenRun(record.request.id, 0, 1, 0, pack_tokens(tokens), None),), step=1))
    group.die()
    world.wait(4.5)
    assert by_length.reason == ["length"]
    assert by_stop.reason == ["stop"]


def test_resume_by_a_client_after_the_broker_was_restarted(world):
    group, client = world.group(), world.client()
    records = client.submit(request(1, max_tokens=20), request(2, max_tokens=20, n=2, logprobs=1))
    world.settle()
    world.step(7)
    world.restart_broker()
    world.tick()
    world.finish(records)
    assert [list(tokens) for record in records for tokens in record.tokens] == [
        text(1, 0, 20)[0],
        text(2, 0, 20)[0],
        text(2, 1, 20)[0],
    ]
    assert group.resets == 1
    assert min(assignment.attempt for assignment in group.assigned[3:]) == 2


def test_exactness_the_card_carries_the_fingerprint_that_decides(world):
    world.group(model=card(fingerprint="abc"))
    client = world.client()
    assert [each.fingerprint for each in client.welcome.cards] == ["abc"]


def test_zombies_late_output_is_dropped_and_counted(world):
    zombie, client = world.group("g0"), world.client()
    (record,) = client.submit(request(1, max_tokens=20))
    world.settle()
    world.step(3)
    zombie.frozen = True
    other = world.group("g1")
    world.wait(6.0)
    world.step(2)
    assert len(other.assigned) == 1
    zombie.thaw()
    world.settle()
    assert world.broker.counters.stale_frames == 1
    assert zombie.resets
    world.finish([record])
    assert record.attempt == [2]


def test_zombies_come_back_empty_and_are_given_new_work(world):
    zombie, client = world.group("g0"), world.client()
    (record,) = client.submit(request(1, max_tokens=20))
    world.settle()
    world.step(3)
    zombie.frozen = True
    world.wait(6.0)
    assert world.broker.report(world.now)["groups"] == []
    zombie.thaw()
    world.settle()
    world.finish([record])
    assert [assignment.attempt for assignment in zombie.assigned] == [1, 2]
    assert zombie.welcomes >= 2


def test_zombies_a_busy_group_that_makes_no_step_is_replaced():
    world = World(progress_timeout=10.0)
    hung, client = world.group("g0"), world.client()
    (record,) = client.submit(request(1, max_tokens=20))
    world.settle()
    world.step(3)
    hung.hung = True
    other = world.group("g1")
    world.wait(12.0)
    assert other.assigned
    world.finish([record])
    assert world.broker.counters.redispatch == {"hung": 1}


def test_zombies_a_group_that_says_it_is_idle_but_was_handed_streams_is_hung():
    """A leader that lost an Assign says that it has nothing to do; its streams must not wait for ever."""
    world = World(progress_timeout=10.0)
    deaf, client = world.group("g0"), world.client()
    (record,) = client.submit(request(1))
    world.settle()
    deaf.rows.clear()
    world.wait(12.0)
    world.finish([record])
    assert world.broker.counters.redispatch == {"hung": 1}


def test_zombies_an_unreadable_message_costs_the_group_its_streams(world):
    group, client = world.group(), world.client()
    (record,) = client.submit(request(1))
    world.settle()
    world.step(2)
    world.feed(Malformed(Face.WORKERS, group.peer, "nonsense"))
    world.finish([record])
    assert group.resets == 1
    assert record.attempt == [2]
    assert world.broker.counters.malformed == {"workers": 1}
