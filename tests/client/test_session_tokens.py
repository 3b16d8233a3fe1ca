"""Law 1 of the session: every token once and in order."""

import pytest

from headrace.messages import (
    Ack,
    Attach,
    Credit,
    TokenRun,
    Tokens,
)
from tests.client.talk import Talk

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


def test_a_repeat_is_acknowledged_again():
    """It comes again because the broker did not hear of the first; in silence it would take the reader for stuck."""
    talk = Talk()
    id = talk.greet()
    talk.run(id, 0, 3)
    assert talk.wait(0.5) == [Credit(acks=(Ack(id, 0, 3, False),))]
    talk.run(id, 0, 3)
    assert Credit(acks=(Ack(id, 0, 3, False),)) in talk.wait(0.5)


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
