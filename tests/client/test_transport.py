"""What the client's thread makes of wishes that came while it was away."""

from __future__ import annotations

from random import Random

from headrace.client.events import Ask, Drop, Start
from headrace.client.session import Session
from headrace.client.transport import Transport
from headrace.client.types import Timeouts
from headrace.messages import GetStatus
from tests.client.probe import spec


def wishes_of(*wishes):
    """What a thread feeds its session with."""
    session = Session("ipc:///here", timeouts=Timeouts(), retries=0, random=Random(1))
    transport = Transport("ipc:///here", session)
    transport._wishes.extend(wishes)
    seen = []
    while transport._wishes:
        seen.append(transport._next_wish())
    return seen


def test_requests_that_follow_each_other_are_one_wish():
    a, b, c = ((number, spec(number)) for number in (1, 2, 3))
    assert wishes_of(Start((a,)), Start((b, c))) == [Start((a, b, c))]


def test_no_wish_overtakes_another():
    a, b, c = ((number, spec(number)) for number in (1, 2, 3))
    wishes = [Start((a,)), Drop(1), Start((b,)), Start((c,)), Ask(4, GetStatus()), Drop(3)]
    assert wishes_of(*wishes) == [Start((a,)), Drop(1), Start((b, c)), Ask(4, GetStatus()), Drop(3)]
