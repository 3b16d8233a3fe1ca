"""The session obeys its laws: its table of transitions row by row, then whatever a broker may say, in any order."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.client.events import Ask, Close, Drop, LinkFailed, Received, Tick
from headrace.client.link import Link
from headrace.client.session import Session
from headrace.client.types import Timeouts
from headrace.errors import (
    AddressError,
    BrokerConnectionError,
    ContextLengthError,
    DeadlineExceededError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    RequestTimeoutError,
    UnavailableError,
    UnknownRequestError,
    UnsupportedVersionError,
)
from headrace.messages import (
    Acceptance,
    Accepted,
    Ack,
    Attach,
    Blob,
    Cancel,
    Cards,
    Credit,
    Describe,
    Done,
    Error,
    Finish,
    GetBlob,
    Hello,
    Ping,
    Pong,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
)
from tests.client.probe import Probe, spec, tokens_of

SEED = 7


class Talk:
    """A probe with a clock, and short words for what happens to it."""

    def __init__(self, *, retries=2, **timeouts):
        limits = Timeouts(**{"connect": 5.0, "first_token": 120.0, "between_tokens": 30.0, **timeouts})
        session = Session("ipc:///here", timeouts=limits, retries=retries, random=Random(1), name="test")
        self.probe = Probe(session)
        self.now = 100.0

    @property
    def link(self):
        return self.probe.session.link

    def start(self, ticket=1, **settings):
        return self.probe.start({ticket: spec(SEED + ticket, **settings)}, self.now)

    def hear(self, message):
        return self.probe.feed(Received(message), self.now)

    def error(self, error, request=b""):
        return self.hear(Error(error=error.to_wire(), request=request))

    def wait(self, seconds, *, broker=True):
        """Let time pass; a living broker answers pings."""
        said = []
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.1)
            heard = self.probe.feed(Tick(), self.now)
            said += heard
            for message in heard:
                if broker and isinstance(message, Ping):
                    self.hear(Pong(nonce=message.nonce))
        return said

    def greet(self):
        """Start one request on a good connection; returns its id."""
        self.start()
        (submit,) = self.hear(Welcome(broker="b"))
        return submit.requests[0].id

    def accept(self, id):
        return self.hear(Accepted(requests=(Acceptance(id, SEED + 1, 8),)))

    def run(self, id, first, count, *, ticket=1, choice=0, attempt=1):
        tokens = tokens_of(SEED + ticket, choice, first, count)
        return self.hear(Tokens(runs=(TokenRun(id, choice, attempt, first, tokens, None),)))

    def done(self, id, total, *, choice=0, attempt=1, reason="length"):
        return self.hear(Done(finishes=(Finish(id, choice, attempt, reason, total, 0),)))

    def outcome(self, ticket=1):
        return self.probe.outcomes[ticket]


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


# ----------------------------------------------------------------------------------------------------- law 1: tokens


def test_repeats_are_dropped_and_gaps_asked_for():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 2)
    talk.run(id, 0, 3)
    assert len(talk.outcome().tokens[0]) == 3
    assert talk.run(id, 5, 1) == [Attach(positions=(Ack(id, 0, 3, False),))]
    assert talk.run(id, 6, 1) == []  # asked a moment ago
    assert len(talk.outcome().tokens[0]) == 3
    talk.run(id, 3, 5)
    talk.done(id, 8)
    assert talk.outcome().completed


def test_an_end_beyond_what_came_is_a_gap():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 2)
    assert talk.done(id, 8) == [Attach(positions=(Ack(id, 0, 2, False),)), Credit(acks=(Ack(id, 0, 2, False),))]
    assert not talk.outcome().over


def test_an_older_attempt_is_not_listened_to():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 2, attempt=3)
    talk.run(id, 2, 2, attempt=2)
    talk.done(id, 2, attempt=2)
    assert len(talk.outcome().tokens[0]) == 2
    assert not talk.outcome().over
    talk.run(id, 2, 1, attempt=4)
    assert len(talk.outcome().tokens[0]) == 3


@pytest.mark.parametrize("run", [{"choice": 1}, {"choice": -1}])
def test_choices_that_nobody_asked_for(run):
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 1, **run)
    talk.done(id, 0, **run)
    assert talk.outcome().tokens == [[]]


def test_a_run_that_is_no_whole_number_of_tokens():
    talk = Talk()
    id = talk.greet()
    talk.hear(Tokens(runs=(TokenRun(id, 0, 1, 0, b"abc", None),)))
    assert talk.outcome().tokens == [[]]


def test_tokens_are_acknowledged_soon_or_at_once():
    talk = Talk()
    id = talk.greet()
    assert talk.run(id, 0, 5) == []
    assert talk.wait(0.3) == [Credit(acks=(Ack(id, 0, 5, False),))]
    assert talk.run(id, 5, 64) == [Credit(acks=(Ack(id, 0, 69, False),))]


def test_the_end_of_an_unknown_request_is_acknowledged():
    """Its last acknowledgement was lost, or it was cancelled; the broker may forget it."""
    talk = Talk()
    talk.greet()
    assert talk.done(b"x" * 16, 5) == [Credit(acks=(Ack(b"x" * 16, 0, 5, True),))]


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


# ------------------------------------------------------------------------------------------- law 3: retry and resume


def test_an_error_that_may_pass_is_tried_again_under_a_new_id():
    talk = Talk()
    id = talk.greet()
    talk.error(OverloadedError("full", retry_after=3.0), id)
    assert not any(isinstance(message, Submit) for message in talk.wait(2.9))
    submits = [message for message in talk.wait(0.2) if isinstance(message, Submit)]
    again = submits[0].requests[0]
    assert again.id != id
    assert again.attempt == 0
    talk.run(again.id, 0, 8)
    talk.done(again.id, 8)
    assert talk.outcome().completed


def test_it_is_not_tried_for_ever():
    talk = Talk(retries=2)
    id = talk.greet()
    for _ in range(2):
        talk.error(UnavailableError("no group"), id)
        assert not talk.outcome().over
        (submit,) = [message for message in talk.wait(3) if isinstance(message, Submit)]
        id = submit.requests[0].id
    talk.error(UnavailableError("no group"), id)
    assert isinstance(talk.outcome().error, UnavailableError)


def test_nobody_waits_beyond_a_deadline():
    talk = Talk()
    talk.start(timeout=2.0)
    (submit,) = talk.hear(Welcome())
    talk.error(OverloadedError("full", retry_after=30.0), submit.requests[0].id)
    assert isinstance(talk.outcome().error, OverloadedError)


def test_after_its_first_token_it_is_resumed():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 3, attempt=2)
    talk.error(UnavailableError("no group"), id)
    (submit,) = [message for message in talk.wait(3) if isinstance(message, Submit)]
    again = submit.requests[0]
    assert again.output == (tokens_of(SEED + 1, 0, 0, 3),)
    assert again.fingerprint == "f0"
    talk.run(again.id, 3, 5)
    talk.done(again.id, 8)
    assert talk.outcome().completed


def test_a_broker_that_forgot_it_gets_it_again_with_its_tokens():
    talk = Talk()
    id = talk.greet()
    talk.accept(id)
    talk.run(id, 0, 3, attempt=2)
    talk.error(ProtocolError("Say Hello first."))
    talk.wait(0.3)
    assert talk.hear(Welcome()) == [Attach(positions=(Ack(id, 0, 3, False),))]
    (submit,) = talk.error(UnknownRequestError("unknown"), id)
    (request,) = submit.requests
    assert request.id == id
    assert request.output == (tokens_of(SEED + 1, 0, 0, 3),)
    assert request.attempt == 2
    talk.run(id, 3, 5, attempt=3)
    talk.done(id, 8, attempt=3)
    assert talk.outcome().completed


def test_a_broker_that_forgets_it_every_time():
    talk = Talk()
    id = talk.greet()
    for _ in range(6):
        assert not talk.outcome().over
        talk.error(UnknownRequestError("unknown"), id)
    assert isinstance(talk.outcome().error, UnknownRequestError)


def test_a_submit_that_was_lost_is_sent_again():
    talk = Talk()
    id = talk.greet()
    submits = [message for message in talk.wait(5.2) if isinstance(message, Submit)]
    assert [message.requests[0].id for message in submits] == [id]
    talk.accept(id)
    assert not any(isinstance(message, Submit) for message in talk.wait(20))


def test_a_stream_that_stands_still_asks_whether_it_missed_something():
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 1)
    assert Attach(positions=(Ack(id, 0, 1, False),)) in talk.wait(10.5)


def test_many_requests_are_few_messages():
    talk = Talk()
    talk.probe.start({ticket: spec(ticket) for ticket in range(1, 601)}, talk.now)
    said = talk.hear(Welcome())
    assert [len(message.requests) for message in said] == [256, 256, 88]
    for message in said:
        for request in message.requests:
            talk.accept(request.id)
    talk.error(ProtocolError("Say Hello first."))
    talk.wait(0.3)
    assert [len(message.positions) for message in talk.hear(Welcome())] == [600]


# ------------------------------------------------------------------------------------------------------- questions


def test_a_question_is_asked_once_for_all_who_want_to_know():
    talk = Talk()
    assert talk.probe.feed(Ask(1, Describe()), talk.now) == [Hello(name="test")]
    talk.probe.feed(Ask(2, Describe()), talk.now)
    assert talk.hear(Welcome()) == [Describe()]
    assert talk.probe.feed(Ask(3, Describe()), talk.now) == []
    talk.hear(Cards(cards=()))
    assert [talk.outcome(ticket).answer for ticket in (1, 2, 3)] == [()] * 3


def test_questions_are_asked_again_on_a_new_connection():
    talk = Talk()
    talk.probe.feed(Ask(1, GetBlob(hash="a", offset=0)), talk.now)
    talk.hear(Welcome())
    talk.error(UnavailableError("The broker is stopping."))
    assert 1 not in talk.probe.outcomes
    talk.wait(0.3)
    assert talk.hear(Welcome()) == [GetBlob(hash="a", offset=0)]
    talk.hear(Blob(hash="a", offset=7, total=1, data=b""))
    blob = Blob(hash="a", offset=0, total=1, data=b"x")
    talk.hear(blob)
    assert talk.outcome().answer == blob


def test_a_refused_question_about_a_blob_spares_the_others():
    talk = Talk()
    talk.probe.feed(Ask(1, GetBlob(hash="a", offset=0)), talk.now)
    talk.probe.feed(Ask(2, Describe()), talk.now)
    talk.hear(Welcome())
    talk.error(ContextLengthError("no such blob", param="hash"))
    assert isinstance(talk.outcome(1).error, ContextLengthError)
    assert 2 not in talk.probe.outcomes


def test_a_question_without_an_answer():
    talk = Talk()
    talk.probe.feed(Ask(1, Describe()), talk.now)
    talk.hear(Welcome())
    talk.wait(31)
    assert isinstance(talk.outcome().error, RequestTimeoutError)


# ------------------------------------------------------------- all laws, whatever a broker says and whenever it says it

CHOICES = 2
TOTAL = 6
STEP = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([0.05, 0.3, 1.2, 4.5, 12.0])),
    st.tuples(st.just("welcome")),
    st.tuples(st.just("accept"), st.integers(0, 2)),
    st.tuples(
        st.just("run"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.integers(0, 6), st.integers(0, 4)
    ),
    st.tuples(st.just("done"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.sampled_from([0, 3, 6])),
    st.tuples(st.just("error"), st.integers(0, 3), st.sampled_from(["unknown", "busy", "bad", "protocol", "stopping"])),
    st.tuples(st.just("start"), st.just(0)),
    st.tuples(st.just("ask"), st.just(0)),
    st.tuples(st.just("drop"), st.integers(1, 4)),
)
ERRORS = {
    "unknown": UnknownRequestError("unknown"),
    "busy": OverloadedError("full"),
    "bad": ContextLengthError("long"),
    "protocol": ProtocolError("Say Hello first."),
    "stopping": UnavailableError("stopping"),
}


@settings(deadline=None, max_examples=400)
@given(steps=st.lists(STEP, max_size=60))
def test_the_laws_hold_whatever_happens(steps):
    talk = Talk(first_token=60, between_tokens=20)
    probe = talk.probe
    next_ticket = 1

    def ids():
        """Names that the broker may know: of the requests under way, and one of nobody."""
        return [*(flight.id for flight in probe.session.flights()), b"?" * 16]

    for step, *args in steps:
        known = ids()
        id = known[args[0] % len(known)] if args and isinstance(args[0], int) else b""
        seed = next((f.sampling["seed"] for f in probe.session.flights() if f.id == id), 0)
        match step:
            case "wait":
                talk.wait(args[0], broker=args[0] < 4)
            case "welcome":
                talk.hear(Welcome())
            case "accept":
                talk.accept(id)
            case "run":
                _, choice, attempt, first, count = args
                tokens = tokens_of(seed, choice, first, count)
                talk.hear(Tokens(runs=(TokenRun(id, choice, attempt, first, tokens, None),)))
            case "done":
                talk.done(id, args[3], choice=args[1], attempt=args[2])
            case "error":
                talk.error(ERRORS[args[1]], b"" if args[0] == 3 else id)
            case "start":
                probe.start({next_ticket: spec(next_ticket, choices=CHOICES, max_tokens=TOTAL)}, talk.now)
                next_ticket += 1
            case "ask":
                probe.feed(Ask(next_ticket, Describe()), talk.now)
                next_ticket += 1
            case "drop":
                probe.feed(Drop(args[0]), talk.now)
    dropped = {step[1] for step in steps if step[0] == "drop"}
    talk.wait(200, broker=False)  # everything ends by itself, one way or the other
    assert list(probe.session.flights()) == []
    assert probe.session.idle
    assert all(outcome.over for ticket, outcome in probe.outcomes.items() if ticket not in dropped)
