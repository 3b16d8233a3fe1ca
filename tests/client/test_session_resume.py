"""Law 3 of the session: tried again before the first token, resumed after it; and questions to the broker."""

from headrace.client.events import Ask
from headrace.errors import (
    ContextLengthError,
    OverloadedError,
    ProtocolError,
    RequestTimeoutError,
    UnavailableError,
    UnknownRequestError,
)
from headrace.messages import (
    Ack,
    Attach,
    Blob,
    Cards,
    Describe,
    GetBlob,
    Hello,
    Submit,
    Welcome,
)
from tests.client.probe import spec, tokens_of
from tests.client.talk import SEED, Talk

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
