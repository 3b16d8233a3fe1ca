"""The session's table of transitions, row by row."""

from headrace.client.events import Close, Drop
from headrace.client.link import Link
from headrace.errors import (
    ProtocolError,
    RequestCancelledError,
)
from headrace.messages import (
    Cancel,
    Hello,
    Ping,
    Submit,
    Welcome,
)
from tests.client.talk import Talk

# ----------------------------------------------------------------------------------------------- the table of link.py


def test_idle_becomes_greeting_with_work():
    talk = Talk()
    assert talk.link is Link.IDLE
    assert talk.start() == [Hello(name="test")]
    assert talk.link is Link.GREETING


def test_greeting_becomes_ready_with_welcome():
    talk = Talk()
    talk.start()
    said = talk.hear(Welcome(broker="b"))
    assert [type(message) for message in said] == [Submit]
    assert talk.link is Link.READY


def test_greeting_is_repeated():
    talk = Talk()
    talk.start()
    assert talk.wait(1.2) == [Hello(name="test")]
    talk.hear(Welcome())
    assert talk.hear(Welcome()) == []  # the answer to the second


def test_greeting_becomes_backoff_after_silence():
    talk = Talk(connect=60)
    talk.start()
    talk.wait(4.2)
    assert talk.link is Link.BACKOFF
    assert not talk.probe.connected


def test_backoff_becomes_greeting_again():
    talk = Talk(connect=600)
    talk.start()
    talk.wait(300)
    states = set()
    for _ in range(200):
        talk.wait(0.1)
        states.add(talk.link)
    assert states == {Link.GREETING, Link.BACKOFF}


def test_ready_becomes_backoff_after_silence():
    talk = Talk()
    talk.greet()
    talk.wait(10)
    assert talk.link is Link.READY
    talk.wait(5, broker=False)
    assert talk.link is not Link.READY


def test_ready_becomes_backoff_when_the_broker_does_not_know_us():
    talk = Talk()
    talk.greet()
    assert talk.error(ProtocolError("Say Hello first.")) == []
    assert talk.link is Link.BACKOFF
    assert talk.wait(0.3) == [Hello(name="test")]


def test_no_work_is_left_in_greeting():
    talk = Talk()
    talk.start()
    talk.probe.feed(Drop(1), talk.now)
    assert talk.link is Link.IDLE
    assert not talk.probe.connected
    assert talk.probe.session.wake_at() is None


def test_no_work_is_left_in_backoff():
    talk = Talk(connect=60)
    talk.start()
    talk.wait(4.2)
    talk.probe.feed(Drop(1), talk.now)
    assert talk.link is Link.IDLE


def test_closed_is_for_ever():
    talk = Talk()
    id = talk.greet()
    assert talk.probe.feed(Close(), talk.now) == [Cancel(requests=(id,))]
    assert talk.link is Link.CLOSED
    assert isinstance(talk.outcome().error, RequestCancelledError)
    assert talk.start(2) == []


def test_an_idle_connection_is_kept_and_not_pinged():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 8)
    talk.done(id, 8)
    assert talk.wait(500) == []
    assert talk.link is Link.READY
    assert [type(message) for message in talk.start(2)] == [Submit]


def test_an_idle_connection_whose_broker_is_gone_is_found_out():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 8)
    talk.done(id, 8)
    talk.wait(500)
    talk.start(2)
    talk.wait(4.1, broker=False)
    assert talk.link is Link.BACKOFF


def test_a_request_on_a_good_connection_is_all_that_is_said_at_first():
    """Its answer shows that the broker lives; after a second without one, a ping asks."""
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 8)
    talk.done(id, 8)
    talk.wait(30)
    assert [type(message) for message in talk.start(ticket=2)] == [Submit]
    assert talk.wait(0.8) == []
    assert [type(message) for message in talk.wait(0.4)] == [Ping]
