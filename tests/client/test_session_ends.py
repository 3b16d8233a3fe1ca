"""Law 2 of the session: every request ends exactly once."""

import pytest

from headrace.client.events import Drop, LinkFailed
from headrace.client.link import Link
from headrace.errors import (
    AddressError,
    BrokerConnectionError,
    ContextLengthError,
    DeadlineExceededError,
    OverloadedError,
    ProtocolError,
    RequestTimeoutError,
    UnsupportedVersionError,
)
from headrace.messages import (
    Ack,
    Cancel,
    Credit,
    Welcome,
)
from tests.client.probe import spec
from tests.client.talk import Talk

# ------------------------------------------------------------------------------------------------------- law 2: ends


def test_a_request_with_choices_ends_with_its_last_choice():
    talk = Talk()
    talk.start(choices=2)
    (submit,) = talk.hear(Welcome())
    id = submit.requests[0].id
    talk.run(id, 0, 8, choice=1)
    talk.done(id, 8, choice=1)
    talk.done(id, 8, choice=1)
    assert not talk.outcome().over
    talk.run(id, 0, 3)
    assert talk.done(id, 3, reason="stop")[-1] == Credit(acks=(Ack(id, 0, 3, True),))
    assert talk.outcome().reasons == {1: "length", 0: "stop"}
    assert talk.outcome().completed
    assert talk.probe.session.idle


def test_an_error_that_does_not_pass_ends_it():
    talk = Talk()
    id = talk.greet()
    talk.error(ContextLengthError("too long", param="prompt"), id)
    error = talk.outcome().error
    assert isinstance(error, ContextLengthError)
    assert (error.param, error.request_id) == ("prompt", id.hex())


def test_each_of_several_callers_gets_an_error_of_its_own():
    talk = Talk()
    talk.probe.start({1: spec(1), 2: spec(2)}, talk.now)
    talk.probe.feed(LinkFailed(AddressError("no such place")), talk.now)
    first, second = talk.outcome(1).error, talk.outcome(2).error
    assert isinstance(first, AddressError)
    assert first is not second
    assert first.request_id != second.request_id


def test_dropping_cancels_on_the_server_and_is_not_told():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 2)
    assert talk.probe.feed(Drop(1), talk.now) == [Cancel(requests=(id,))]
    talk.run(id, 2, 2)
    assert not talk.outcome().over
    assert len(talk.outcome().tokens[0]) == 2


def test_a_cancel_waits_for_a_connection():
    talk = Talk()
    id = talk.greet()
    talk.start(2)
    talk.error(ProtocolError("Say Hello first."))
    talk.probe.feed(Drop(1), talk.now)
    talk.wait(0.3)
    said = talk.hear(Welcome())
    assert said[0] == Cancel(requests=(id,))


@pytest.mark.parametrize(
    ("timeouts", "until", "kind", "what"),
    [
        ({"first_token": 20}, 20, RequestTimeoutError, "no first token within 20 s: the workers are stuck"),
        ({}, 120, RequestTimeoutError, "no first token within 120 s"),
    ],
)
def test_no_first_token(timeouts, until, kind, what):
    talk = Talk(**timeouts)
    id = talk.greet()
    talk.accept(id)
    talk.wait(until - 0.5)
    assert not talk.outcome().over
    said = talk.wait(1)
    assert Cancel(requests=(id,)) in said
    assert isinstance(talk.outcome().error, kind)
    assert what in talk.outcome().error.message


def test_no_further_token():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 1)
    talk.wait(29)
    assert not talk.outcome().over
    talk.wait(2)
    assert "no further token within 30 s" in talk.outcome().error.message


def test_the_callers_own_time_limit():
    talk = Talk()
    talk.start(timeout=3.0)
    (submit,) = talk.hear(Welcome())
    assert submit.requests[0].budget_ms == 3000
    talk.wait(3.2)
    assert isinstance(talk.outcome().error, DeadlineExceededError)
    assert "within the 3 s allowed" in talk.outcome().error.message


def test_no_broker():
    talk = Talk()
    talk.start()
    talk.wait(4.5, broker=False)
    assert not talk.outcome().over
    talk.wait(1, broker=False)
    error = talk.outcome().error
    assert isinstance(error, BrokerConnectionError)
    assert "There is no broker at ipc:///here" in error.message
    assert talk.link is Link.IDLE


def test_a_broker_that_went_away_ends_streams_by_their_own_limits():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 1)
    talk.wait(29, broker=False)
    assert not talk.outcome().over
    talk.wait(2, broker=False)
    assert "went away and did not come back" in talk.outcome().error.message


def test_a_broker_that_takes_no_more_clients():
    talk = Talk()
    talk.start()
    for _ in range(60):
        if talk.link is Link.GREETING:
            talk.error(OverloadedError("The broker already serves 5 clients.", retry_after=5.0))
        talk.wait(0.1)
    error = talk.outcome().error
    assert isinstance(error, OverloadedError)
    assert "already serves" in error.message


def test_a_broker_of_another_version():
    talk = Talk()
    talk.start()
    talk.error(UnsupportedVersionError("versions 1 and 2"))
    assert isinstance(talk.outcome().error, UnsupportedVersionError)
    assert talk.link is Link.IDLE


def test_a_broker_that_never_understands_us():
    talk = Talk(connect=600)
    talk.start()
    for _ in range(50):
        if talk.link is Link.GREETING:
            talk.hear(Welcome())
            talk.error(ProtocolError("A Submit body is not valid."))
        talk.wait(1)
    assert isinstance(talk.outcome().error, ProtocolError)
