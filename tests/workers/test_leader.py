"""The leader's core: what it says to the broker, and what it never says."""

from itertools import pairwise

import pytest

from headrace.codec import BLOB_CHUNK, decode, encode
from headrace.errors import InvalidRequestError, UnsupportedVersionError
from headrace.messages import (
    LEADER_TO_BROKER,
    Blob,
    Done,
    Drained,
    Error,
    Finish,
    GetBlob,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Refusal,
    Refused,
    Reset,
    Revoke,
    StreamId,
    TokenRun,
    Tokens,
    pack_tokens,
)
from headrace.workers.leader import Link
from headrace.workers.leader_events import (
    Beat,
    Blocked,
    Call,
    Connect,
    Disconnect,
    Drain,
    End,
    Flowing,
    LinkLost,
    Note,
    Received,
    Refusals,
    Stepped,
    Tell,
    Tick,
)
from headrace.workers.plan import RevokeAll
from tests.support.fake_group import fake_card
from tests.support.leader_core import LAST_WORDS, A, B, assign, make_leader, of, results, run, sent


@pytest.fixture
def leader():
    """One that the broker welcomed at time 0."""
    leader = make_leader()
    leader.handle(Tick(), 0.0)
    leader.handle(Received(GroupWelcome(broker="b1", heartbeat_ms=1000)), 0.0)
    yield leader
    leader.validate()


# ------------------------------------------------------------------------------------------------------ connections


def test_it_begins_with_a_hello_and_then_heartbeats():
    leader = make_leader()
    actions = leader.handle(Tick({"running": 0}), 10.0)
    assert actions[0] == Connect()
    assert sent(actions) == [GroupHello(group="g", card=fake_card(), max_num_seqs=4, kv_tokens=512)]
    assert leader.wake_at() <= 15.0

    actions = leader.handle(Received(GroupWelcome(heartbeat_ms=500)), 10.1)
    assert leader.link is Link.READY
    assert Tell("ready", {}) in actions
    assert sent(actions) == [Heartbeat(step=0, busy=False, load={"running": 0})]
    assert leader.wake_at() == pytest.approx(10.6)
    assert not leader.needs_load(10.5)
    assert leader.needs_load(10.6)
    assert sent(leader.handle(Tick({"running": 3}), 10.6)) == [Heartbeat(step=0, busy=False, load={"running": 3})]


@pytest.mark.parametrize(("asked", "kept"), [(0, 0.05), (-5, 0.05), (10**9, 10.0)])
def test_a_strange_heartbeat_period_is_brought_into_bounds(asked, kept):
    leader = make_leader()
    leader.handle(Tick(), 0.0)
    leader.handle(Received(GroupWelcome(heartbeat_ms=asked)), 0.0)
    assert leader.wake_at() == pytest.approx(kept)


def test_without_a_broker_it_tries_again_on_new_sockets_ever_more_slowly():
    leader = make_leader()
    greetings = []
    now = 0.0
    while len(greetings) < 12:
        actions = leader.handle(Tick(), now)
        if of(actions, Connect):
            assert len(sent(actions, GroupHello)) == 1
            greetings.append(now)
        if of(actions, Disconnect):
            assert Tell("waiting", {}) in actions
        now = max(now + 0.01, leader.wake_at())
    gaps = [later - earlier for earlier, later in pairwise(greetings)]
    assert gaps[0] == pytest.approx(5.0, abs=0.05)
    assert gaps == sorted(gaps)
    assert gaps[-1] == pytest.approx(10.0, abs=0.05)


def test_a_reset_drops_everything_and_says_hello_on_a_new_socket_with_what_ran(leader):
    leader.handle(assign((A, 0, 1), (A, 1, 2)), 20.0)
    leader.handle(assign((B, 0, 1)), 20.0)
    leader.handle(Received(Revoke(streams=(StreamId(B, 0, 1),))), 20.0)
    actions = leader.handle(Received(Reset(reason="silent")), 21.0)
    assert of(actions, Call) == [Call(RevokeAll())]
    assert of(actions, Disconnect)
    assert not sent(actions)
    actions = leader.handle(Tick(), 21.0)
    assert actions[0] == Connect()
    assert sent(actions, GroupHello)[0].running == (StreamId(A, 0, 1), StreamId(A, 1, 2))
    leader.handle(Received(GroupWelcome()), 21.1)
    leader.handle(Received(Reset()), 40.0)
    assert sent(leader.handle(Tick(), 40.0), GroupHello)[0].running == ()


def test_what_ran_is_named_until_a_broker_heard_it(leader):
    leader.handle(assign((A, 0, 1)), 20.0)
    leader.handle(LinkLost(), 21.0)
    assert sent(leader.handle(Tick(), 21.0), GroupHello)[0].running == (StreamId(A, 0, 1),)
    leader.handle(LinkLost(), 22.0)  # a broker that came and went
    actions = leader.handle(Tick(), 30.0)
    assert sent(actions, GroupHello)[0].running == (StreamId(A, 0, 1),)


def test_late_results_of_a_dropped_connection_are_not_sent(leader):
    """SIGCONT after the broker gave the group up: the step that was under way ends after the reset."""
    leader.handle(assign((A, 0, 1)), 1.0)
    leader.handle(Received(Reset()), 20.0)
    assert not sent(leader.handle(Stepped(results([run()], [Finish(A, 0, 1, "stop", 1, 0)]), 5), 20.0))
    leader.handle(Tick(), 20.0)
    assert not sent(leader.handle(Stepped(results([run()]), 6), 20.0))
    leader.handle(Received(GroupWelcome()), 20.1)
    assert not sent(leader.handle(Stepped(results([run()]), 7), 20.1))


def test_two_groups_of_one_name_do_not_chase_each_other_at_full_speed(leader):
    now, hellos = 0.0, 0
    while now < 60.0:
        leader.handle(Received(Reset(reason="Another group said it is 'g'")), now)
        while not of(leader.handle(Tick(), now), Connect):
            now = leader.wake_at()
        hellos += 1
        now += 0.01
        leader.handle(Received(GroupWelcome()), now)
    assert hellos < 25


def test_after_good_service_a_new_hello_follows_at_once(leader):
    for start in (100.0, 200.0, 300.0):
        leader.handle(Received(Reset()), start)
        assert of(leader.handle(Tick(), start), Connect)
        leader.handle(Received(GroupWelcome()), start + 0.1)


def test_a_broker_that_will_never_take_the_group_ends_it():
    leader = make_leader()
    leader.handle(Tick(), 0.0)
    actions = leader.handle(Received(Error(error=UnsupportedVersionError("version 7").to_wire())), 0.1)
    [end] = of(actions, End)
    assert isinstance(end.error, UnsupportedVersionError)
    assert leader.handle(Tick(), 99.0) == []


def test_a_complaint_later_on_is_only_logged(leader):
    actions = leader.handle(Received(Error(error=InvalidRequestError("odd").to_wire())), 1.0)
    assert [type(a) for a in actions] == [Note]
    assert leader.link is Link.READY


def test_a_blocked_broker_stops_the_steps_and_after_a_while_the_connection(leader):
    leader.handle(assign((A, 0, 1)), 1.0)
    leader.handle(Blocked(), 1.0)
    assert not leader.may_step
    assert not of(leader.handle(Tick(), 30.0), Disconnect)
    leader.handle(Flowing(), 30.5)
    assert leader.may_step
    leader.handle(Blocked(), 31.0)
    assert leader.wake_at() <= 61.0
    actions = leader.handle(Tick(), 61.0)
    assert of(actions, Call) == [Call(RevokeAll())]
    assert of(actions, Disconnect)
    assert leader.may_step


# ---------------------------------------------------------------------------------------------------------- streams


def test_a_step_is_one_message_of_tokens_then_ends_then_refusals(leader):
    leader.handle(assign((A, 0, 1), (A, 1, 1), (B, 0, 3)), 1.0)
    refusal = Refusal(B, 0, 3, InvalidRequestError("NaN").to_wire())
    step = results([run(), run(choice=1)], [Finish(A, 1, 1, "stop", 1, 0)], [refusal])
    assert sent(leader.handle(Stepped(step, 9), 1.1)) == [
        Tokens(runs=(run(), run(choice=1)), step=9),
        Done(finishes=(Finish(A, 1, 1, "stop", 1, 0),)),
        Refused(refusals=(refusal,)),
    ]
    assert sent(leader.handle(Stepped(step, 10), 1.2)) == [Tokens(runs=(run(),), step=10)]  # the others are over


def test_a_step_without_output_says_nothing_but_counts(leader):
    leader.handle(assign((A, 0, 1)), 1.0)
    assert not sent(leader.handle(Stepped(results(), 3), 1.5))
    assert sent(leader.handle(Tick(), 2.0)) == [Heartbeat(step=3, busy=True)]


def test_only_the_newest_attempt_is_heard(leader):
    leader.handle(assign((A, 0, 2)), 1.0)
    leader.handle(assign((A, 0, 1)), 1.0)
    assert not sent(leader.handle(Stepped(results([run(attempt=1)]), 1), 1.1))
    leader.handle(assign((A, 0, 5)), 1.2)
    assert not sent(leader.handle(Stepped(results([run(attempt=2)]), 2), 1.3))
    assert sent(leader.handle(Stepped(results([run(attempt=5)]), 3), 1.4), Tokens)


def test_a_revoke_of_an_older_attempt_leaves_the_present_one_alone(leader):
    leader.handle(assign((A, 0, 2)), 1.0)
    leader.handle(Received(Revoke(streams=(StreamId(A, 0, 1), StreamId(B, 0, 1)))), 1.0)
    assert sent(leader.handle(Stepped(results([run(attempt=2)]), 1), 1.1), Tokens)
    actions = leader.handle(Received(Revoke(streams=(StreamId(A, 0, 2),))), 1.2)
    assert of(actions, Call) == [Call(Revoke(streams=(StreamId(A, 0, 2),)))]
    assert not sent(leader.handle(Stepped(results([run(attempt=2)]), 2), 1.3))


def test_what_the_engine_would_not_take_on_is_refused(leader):
    leader.handle(assign((A, 0, 1), (B, 0, 1)), 1.0)
    refusal = Refusal(A, 0, 1, InvalidRequestError("no such token", param="prompt").to_wire())
    assert sent(leader.handle(Refusals([refusal]), 1.0)) == [Refused(refusals=(refusal,))]
    assert not sent(leader.handle(Refusals([refusal]), 1.0))
    assert sent(leader.handle(Tick(), 1.0), Heartbeat)[0].busy


def test_calls_keep_the_broker_s_order(leader):
    first, second = assign((A, 0, 1)), assign((B, 0, 1))
    drop = Received(Revoke(streams=(StreamId(A, 0, 1),)))
    calls = [a for event in (first, drop, second) for a in leader.handle(event, 1.0)]
    assert calls == [Call(first.message), Call(drop.message), Call(second.message)]


def test_a_huge_step_stays_within_the_limits_of_the_codec():
    leader = make_leader()
    leader.handle(Tick(), 0.0)
    leader.handle(Received(GroupWelcome()), 0.0)
    streams = [(b"%016d" % index, 0, 1) for index in range(3000)]
    leader.handle(assign(*streams), 1.0)
    top = [[token, -1.0] for token in range(20)]
    runs = [TokenRun(*stream, 0, pack_tokens([1]), [[-0.5, top]]) for stream in streams]
    messages = sent(leader.handle(Stepped(results(runs), 1), 1.0), Tokens)
    assert [r for message in messages for r in message.runs] == runs
    for message in messages:
        assert decode(encode(message), LEADER_TO_BROKER) == message


# ----------------------------------------------------------------------------------------------- heartbeats and blobs


def test_during_a_step_nothing_but_heartbeats_goes_out(leader):
    leader.handle(assign((A, 0, 1)), 0.5)
    leader.handle(Drain(2.0), 0.6)
    assert not leader.handle(Beat(), 0.7)
    actions = leader.handle(Beat(), 1.7)
    assert sent(actions) == [Heartbeat(step=0, busy=True, load={"draining": 1})]
    actions = leader.handle(Beat(), 9.0)  # long past the time to drain: that is for the loop to see
    assert sent(actions, Drained) == []
    assert sent(leader.handle(Tick(), 9.0))[-2:] == LAST_WORDS


def test_the_launcher_hears_of_progress_with_and_without_a_broker():
    leader = make_leader()
    assert Tell("beat", {"step": 0, "busy": False}) in leader.handle(Tick(), 0.0)
    actions = leader.handle(Tick(), 1.0)
    assert of(actions, Tell) == [Tell("beat", {"step": 0, "busy": False})]
    assert not sent(actions)


def test_blobs_go_out_in_parts():
    data = bytes(range(256)) * 5000
    leader = make_leader(h1=data)
    leader.handle(Tick(), 0.0)
    leader.handle(Received(GroupWelcome()), 0.0)
    got = b""
    while len(got) < len(data):
        [part] = sent(leader.handle(Received(GetBlob(hash="h1", offset=len(got))), 0.1), Blob)
        assert (part.hash, part.offset, part.total) == ("h1", len(got), len(data))
        assert len(part.data) <= BLOB_CHUNK
        got += part.data
    assert got == data
    for question in (GetBlob(hash="h2"), GetBlob(hash="h1", offset=-1), GetBlob(hash="h1", offset=len(data) + 1)):
        assert [type(a) for a in leader.handle(Received(question), 0.2)] == [Note]
