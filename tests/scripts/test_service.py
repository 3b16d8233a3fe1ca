"""A supervised child: started again, later each time, unless it was never ready."""

import time

import pytest

from headrace.errors import InternalError, ModelFilesError
from headrace.processes import Child
from headrace.scripts.service import Service
from tests.support.children import LIMIT, echo, exit_with, fail, ignore_sigterm, wait_until


@pytest.fixture
def lines():
    return []


@pytest.fixture
def start(lines):
    """Starts a service of a function; ends it after the test."""
    services = []

    def start(target, clock=time.monotonic, **kwargs):
        made = []

        def make(facts):
            made.append(facts)
            return Child("service", target, kwargs)

        service = Service("mill", make, lines.append, clock=clock)
        service.made = made
        services.append(service)
        service.start()
        return service

    yield start
    for service in services:
        service.end(0.0)


def turn_until(service, condition):
    def turn():
        service.turn()
        return condition()

    wait_until(turn, "the service gets there", LIMIT)


def test_it_says_what_it_said_when_it_was_ready(start):
    service = start(echo, url="http://mill/")

    turn_until(service, lambda: service.ready)

    assert service.facts["url"] == "http://mill/"
    assert service.made == [{}]


def test_it_is_started_again_with_what_it_said_before(start, lines):
    service = start(echo, url="http://mill/")
    turn_until(service, lambda: service.ready)
    first = service.facts["pid"]

    service.child.kill()
    turn_until(service, lambda: service.facts["pid"] != first)

    assert service.made[1] == {"pid": first, "url": "http://mill/"}
    assert lines[0].startswith("The mill was ended by SIGKILL")
    assert lines[0].endswith("it starts again in 0.5 s.")
    assert lines[1] == "The mill is back."


def test_pauses_grow_and_a_good_life_resets_them(start, lines):
    now = [1000.0]
    service = start(echo, clock=lambda: now[0])
    turn_until(service, lambda: service.ready)

    def die():
        service.child.kill()
        turn_until(service, lambda: service.restart_at is not None)
        pause, now[0] = service.restart_at - now[0], service.restart_at
        service.turn()
        return pause

    pauses = [die() for _ in range(7)]
    now[0] += 61

    assert pauses == [0.5, 1, 2, 4, 8, 15, 15]
    assert die() == 0.5


def test_one_that_was_never_ready_is_an_error(start):
    service = start(exit_with, code=3)
    with pytest.raises(InternalError, match="The mill ended with code 3 before it was ready"):
        turn_until(service, lambda: service.ready)


def test_its_own_error_is_kept(start):
    service = start(fail)
    with pytest.raises(ModelFilesError, match="7 bytes short"):
        turn_until(service, lambda: service.ready)


def test_it_is_not_started_again_once_it_was_asked_to_end(start, lines):
    service = start(echo)
    turn_until(service, lambda: service.ready)

    service.ask_to_end()
    turn_until(service, lambda: service.child is None)

    assert service.restart_at is None
    assert lines == []


def test_end_does_not_wait_longer_than_it_may(start):
    service = start(ignore_sigterm)
    turn_until(service, lambda: service.child.alive and service.ready)

    child = service.child
    service.end(0.1)

    assert not child.alive
