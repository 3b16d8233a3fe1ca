"""How a leader leaves: everything finished or handed back, and said in time."""

import pytest

from headrace.errors import UnavailableError, from_wire
from headrace.messages import (
    Done,
    Drained,
    Finish,
    GroupWelcome,
    Heartbeat,
    Reset,
    Revoke,
    StreamId,
    Tokens,
)
from headrace.messages import (
    Drain as DrainMessage,
)
from headrace.workers.leader import Link
from headrace.workers.leader_events import (
    Call,
    Drain,
    End,
    LinkLost,
    Received,
    Send,
    Stepped,
    Tick,
)
from headrace.workers.plan import RevokeAll
from tests.support.leader_core import LAST_WORDS, A, B, assign, make_leader, of, results, run, sent


@pytest.fixture
def leader():
    """One that the broker welcomed at time 0."""
    leader = make_leader()
    leader.handle(Tick(), 0.0)
    leader.handle(Received(GroupWelcome(broker="b1", heartbeat_ms=1000)), 0.0)
    yield leader
    leader.validate()


def test_draining_finishes_what_runs_and_says_so_last(leader):
    leader.handle(assign((A, 0, 1)), 1.0)
    actions = leader.handle(Drain(30.0), 2.0)
    assert sent(actions) == [Heartbeat(step=0, busy=True, load={"draining": 1})]
    crossed = sent(leader.handle(assign((B, 0, 1)), 2.1))
    assert isinstance(from_wire(crossed[0].refusals[0].error), UnavailableError)
    assert sent(leader.handle(Stepped(results([run()]), 1), 3.0), Tokens)
    actions = leader.handle(Stepped(results([run(first=1)], [Finish(A, 0, 1, "length", 2, 0)]), 2), 3.1)
    assert [type(message) for message in sent(actions)] == [Tokens, Done, Drained, Heartbeat]
    assert leader.handle(assign((A, 0, 2)), 3.2) == []
    assert leader.handle(Received(Reset(reason="not known")), 3.2) == [End(None)]
    assert leader.handle(Tick(), 99.0) == []


@pytest.mark.parametrize("order", ["launcher", "broker"])
def test_draining_ends_when_the_time_is_over(leader, order):
    leader.handle(assign((A, 0, 1)), 1.0)
    leader.handle(Drain(3.0) if order == "launcher" else Received(DrainMessage(grace_ms=3000)), 1.0)
    leader.handle(Tick(), 3.9)
    assert leader.link is Link.READY
    assert leader.wake_at() <= 4.0
    actions = leader.handle(Tick(), 4.0)
    assert of(actions, Call) == [Call(RevokeAll())]
    assert sent(actions) == LAST_WORDS


def test_a_second_wish_to_drain_can_only_shorten_the_time(leader):
    leader.handle(assign((A, 0, 1)), 1.0)
    leader.handle(Drain(30.0), 1.0)
    leader.handle(Drain(60.0), 2.0)
    leader.handle(Tick(), 30.9)
    assert leader.link is Link.READY
    assert sent(leader.handle(Drain(-1.0), 30.9))[-2:] == LAST_WORDS
    assert leader.handle(Drain(9.0), 31.0) == []


def test_an_idle_group_drains_at_once(leader):
    actions = leader.handle(Drain(30.0), 1.0)
    assert sent(actions)[-2:] == LAST_WORDS


def test_the_last_stream_may_be_revoked_while_draining(leader):
    leader.handle(assign((A, 0, 1)), 1.0)
    leader.handle(Drain(30.0), 1.0)
    actions = leader.handle(Received(Revoke(streams=(StreamId(A, 0, 1),))), 2.0)
    assert sent(actions) == LAST_WORDS


@pytest.mark.parametrize("event", [LinkLost(), Received(Reset()), None])
def test_it_stays_until_its_last_words_were_heard_or_nobody_listens(leader, event):
    """A socket that is closed while the broker is far behind would lose them, whatever its linger."""
    leader.handle(Drain(30.0), 1.0)
    assert leader.link is Link.LEAVING
    assert not of(leader.handle(Tick(), 4.9), End)
    assert leader.wake_at() <= 5.0
    actions = leader.handle(Tick(), 5.0) if event is None else leader.handle(event, 4.9)
    assert of(actions, End) == [End(None)]


def test_draining_without_a_broker_ends_at_once():
    leader = make_leader()
    assert leader.handle(Drain(30.0), 0.0) == [End(None)]


def test_draining_before_the_welcome_takes_the_hello_back():
    leader = make_leader()
    leader.handle(Tick(), 0.0)
    assert leader.handle(Drain(30.0), 1.0) == [Send(Drained()), End(None)]


def test_a_connection_that_breaks_while_draining_ends_it(leader):
    leader.handle(assign((A, 0, 1)), 1.0)
    leader.handle(Drain(30.0), 1.0)
    actions = leader.handle(LinkLost(), 2.0)
    assert of(actions, Call) == [Call(RevokeAll())]
    assert actions[-1] == End(None)
