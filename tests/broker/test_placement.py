"""Which group runs a stream: free rows, room, fingerprint, what it ran before, what it likely has in its cache."""

from __future__ import annotations

import pytest

from headrace.broker.groups import Group, GroupState
from headrace.broker.placement import PrefixAffinity, can_run, choose, is_settled
from headrace.errors import UnavailableError
from headrace.messages import GroupHello, StreamId
from tests.broker.test_queues import stream
from tests.broker.world import World, card, request

LONG = tuple(range(200))


def group(
    name: str, *, rows: int = 8, busy: int = 0, kv_tokens: int = 1000, fingerprint: str = "f", running=()
) -> Group:
    hello = GroupHello(
        group=name, card=card(fingerprint=fingerprint), max_num_seqs=rows, kv_tokens=kv_tokens, running=running
    )
    made = Group(name.encode(), hello, 0.0)
    made.state = GroupState.READY
    for number in range(busy):
        other = stream(1000 + number)
        made.streams[other.id] = other
    return made


def test_the_least_loaded_group_is_taken():
    groups = [group("a", busy=3), group("b", busy=1), group("c", busy=2)]
    assert choose(stream(), groups, PrefixAffinity()).name == "b"


def test_load_is_relative_to_size_and_names_break_ties():
    assert choose(stream(), [group("a", rows=4, busy=2), group("b", rows=16, busy=4)], PrefixAffinity()).name == "b"
    assert choose(stream(), [group("b"), group("a")], PrefixAffinity()).name == "a"


def test_full_draining_and_reserved_groups_are_left_out():
    full, draining, reserved = group("a", rows=1, busy=1), group("b"), group("c")
    draining.state = GroupState.DRAINING
    reserved.exclusive = stream(7)
    assert choose(stream(), [full, draining, reserved], PrefixAffinity()) is None


def test_another_fingerprint_cannot_continue_what_began():
    begun, fresh = stream(output=1), stream()
    other = group("a", fingerprint="g")
    assert choose(begun, [other], PrefixAffinity()) is None
    assert choose(fresh, [other], PrefixAffinity()) is other
    assert can_run(begun, group("b"))


def test_a_group_that_cannot_hold_the_stream_is_no_choice():
    """Groups of one model may have caches of different size; the small one refused what the large one could run."""
    small, large = group("a", kv_tokens=10), group("b", kv_tokens=11, busy=5)
    assert choose(stream(tokens=3), [small, large], PrefixAffinity()) is large
    assert choose(stream(tokens=4), [small, large], PrefixAffinity()) is None


def test_a_group_that_ran_the_stream_before_comes_first():
    here = group("b", busy=6, running=(StreamId((1).to_bytes(16), 0, 3),))
    assert choose(stream(1), [group("a"), here], PrefixAffinity()) is here


def test_a_known_prefix_draws_unless_its_group_is_notably_fuller():
    affinity, home = PrefixAffinity(), group("b", rows=16, busy=4)
    one = stream(1, tokens=200)
    affinity.remember(one, home)
    assert choose(stream(2, tokens=300), [group("a", rows=16), home], affinity) is home
    fuller = group("b", rows=16, busy=5)
    assert choose(stream(2, tokens=300), [group("a", rows=16), fuller], affinity).name == "a"


def test_affinity_is_bounded_and_forgets_the_least_used():
    affinity, home = PrefixAffinity(capacity=3), group("a")
    streams = [stream(n, tokens=n) for n in range(1, 6)]
    for each in streams[:3]:
        affinity.remember(each, home)
    affinity.remember(streams[0], home)
    affinity.remember(streams[3], home)
    assert len(affinity) == 3
    assert affinity.group_for(streams[1]) is None
    assert affinity.group_for(streams[0]) == "a"


@pytest.mark.parametrize(("first_step", "settled"), [(-1, False), (93, False), (92, True), (0, True)])
def test_a_group_is_settled_when_everybody_stepped_for_a_while(first_step, settled):
    here = group("a", busy=1)
    here.step = 100
    (one,) = here.streams.values()
    one.first_step = first_step
    assert is_settled(here, 8) is settled
    assert is_settled(group("b"), 8)


# ------------------------------------------------------------------------------------------- with the whole core


def test_prompts_that_begin_alike_meet_on_one_group():
    world = World()
    first, second = world.group("g0", rows=16), world.group("g1", rows=16)
    client = world.client()
    for number in range(1, 9):
        client.submit(request(number, prompt=LONG if number % 2 else LONG[::-1], max_tokens=40))
        world.settle()
    by_group = [{assignment.prompt for assignment in group.assigned} for group in (first, second)]
    assert sorted(map(len, by_group)) == [1, 1]


def test_streams_are_spread_over_the_groups():
    world = World()
    groups = [world.group(f"g{n}", rows=8) for n in range(3)]
    client = world.client()
    client.submit(*(request(n, prompt=(n,) * 5, max_tokens=40) for n in range(1, 13)))
    world.settle()
    assert [len(group.rows) for group in groups] == [4, 4, 4]


def test_a_group_that_lost_its_connection_gets_its_streams_back():
    world = World()
    group, other = world.group("g0", life="one"), world.group("g1")
    client = world.client()
    records = client.submit(*(request(n, prompt=(n,), max_tokens=60) for n in range(1, 7)))
    world.settle()
    world.step(10)
    held = set(group.rows)
    other.hung = True
    group.peer = world.new_peer("g0")
    group.hello()
    world.settle()
    again = {StreamId(a.request, a.choice, a.attempt - 1) for a in group.assigned[len(held) :]}
    assert again == held
    other.hung = False
    world.finish(records)


def test_the_large_group_gets_what_only_it_can_hold():
    world = World()
    small, large = world.group("g0", kv_tokens=50), world.group("g1", kv_tokens=500)
    client = world.client()
    world.run(client, *(request(n, prompt=(n,) * 60) for n in range(1, 9)))
    assert not small.assigned
    assert len(large.assigned) == 8


def test_what_only_a_group_that_left_could_hold_does_not_wait_for_ever():
    world = World()
    world.group("g0", kv_tokens=50)
    large = world.group("g1", kv_tokens=500, rows=1)
    client = world.client()
    _, waiting = client.submit(*(request(n, prompt=(n,) * 60, max_tokens=100) for n in (1, 2)))
    world.settle()
    large.drain()
    large.alive = False
    world.wait(1.0)
    assert isinstance(waiting.error, UnavailableError)
    assert waiting.error.retryable


def test_many_heavy_assignments_are_split_over_messages():
    """A turn's worth of requests with long logit biases once made one message that no leader would decode."""
    world = World()
    group = world.group(rows=200, model=card(vocab_size=5000))
    client = world.client()
    bias = [[token, 1.0] for token in range(1024)]
    records = []
    for number in range(1, 151):
        records += client.submit(request(number, logit_bias=bias, max_tokens=1))
    world.settle()
    assert len(group.assigned) == 150
    world.finish(records)
