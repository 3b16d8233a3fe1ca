"""Greetings, strangers, and questions: what the broker says to whom, and what it tells people about itself."""

from __future__ import annotations

import random

import pytest

from headrace.broker.config import BrokerConfig
from headrace.broker.core import Broker
from headrace.broker.events import Face, Malformed, Note, Received, Send, Stop
from headrace.errors import (
    ConfigError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
    UnsupportedVersionError,
    from_wire,
)
from headrace.messages import (
    Cards,
    Describe,
    Error,
    GetStatus,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Hello,
    Ping,
    Pong,
    Reset,
    Status,
    Welcome,
)
from tests.broker.world import World, card, request


def core(**config) -> Broker:
    return Broker(BrokerConfig(**config), rng=random.Random(0))


def sends(actions):
    return [action.message for action in actions if isinstance(action, Send)]


def say(broker, message, peer=b"p", face=Face.CLIENTS, now=0.0):
    return sends(broker.handle(Received(face, peer, message), now))


def test_a_client_is_welcomed_with_cards_and_limits():
    world = World()
    world.group(model=card("m"))
    welcome = world.client().welcome
    assert welcome.version == 1
    assert welcome.broker == "run-1"
    assert [each.name for each in welcome.cards] == ["m"]
    assert welcome.limits["window_bytes"] == 1 << 20
    assert {"max_n", "ack_tokens", "ack_ms", "silence_ms", "grace_ms", "max_queued_requests"} <= set(welcome.limits)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_told_both_versions(version):
    broker = core()
    (answer,) = say(broker, Hello(version=version))
    error = from_wire(answer.error)
    assert type(error) is UnsupportedVersionError
    assert f"version {version}" in error.message
    assert "version 1" in error.message
    assert not broker.delivery.connections
    hello = GroupHello(group="g", card=card(), max_num_seqs=1, kv_tokens=10, version=version)
    (answer,) = say(broker, hello, face=Face.WORKERS)
    assert type(from_wire(answer.error)) is UnsupportedVersionError
    assert not broker.registry.by_peer


@pytest.mark.parametrize("message", [Ping(), Describe(), GetStatus()])
def test_a_client_that_did_not_greet_is_asked_to_but_not_too_often(message):
    broker = core()
    (answer,) = say(broker, message)
    assert "Say Hello first" in answer.error["message"]
    assert say(broker, message, now=0.5) == []
    assert len(say(broker, message, now=1.1)) == 1


def test_a_group_that_did_not_greet_is_told_to_start_over_but_not_too_often():
    broker = core()
    beat = Heartbeat(step=1, busy=True)
    (answer,) = say(broker, beat, face=Face.WORKERS)
    assert isinstance(answer, Reset)
    assert say(broker, beat, face=Face.WORKERS, now=0.5) == []
    assert broker.counters.stale_frames == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": ""},
        {"kv_tokens": 0},
        {"max_num_seqs": 0},
        {"max_num_seqs": 65537},
        {"card": card("")},
        {"card": card(vocab_size=0)},
        {"card": card(max_model_len=0)},
        {"card": card(blobs={str(n): "h" for n in range(17)})},
    ],
    ids=lambda wrong: ",".join(wrong),
)
def test_a_group_that_makes_no_sense_is_refused(wrong):
    broker = core()
    fields = {"group": "g", "card": card(), "max_num_seqs": 1, "kv_tokens": 10, **wrong}
    (answer,) = say(broker, GroupHello(**fields), face=Face.WORKERS)
    assert type(from_wire(answer.error)) is ProtocolError
    assert not broker.registry.by_peer


def test_a_group_is_told_how_often_to_beat():
    broker = core(heartbeat=0.5)
    hello = GroupHello(group="g", card=card(), max_num_seqs=1, kv_tokens=10)
    assert say(broker, hello, face=Face.WORKERS) == [GroupWelcome(broker="broker", heartbeat_ms=500)]


def test_of_two_groups_with_one_name_the_newer_stays():
    """They once threw each other out in turns, for ever."""
    world = World()
    first, second = world.group("twin"), world.group("twin")
    client = world.client()
    (record,) = world.run(client, request(1, max_tokens=60))
    assert world.broker.registry.by_name["twin"].peer == second.peer
    assert {type(error) for error in first.errors} == {ConfigError}
    assert "own name" in first.errors[0].message
    assert second.welcomes == 1
    assert record.attempt == [1]
    second.die()
    world.wait(5.0)
    assert world.broker.registry.by_name["twin"].peer == first.peer  # the name is free again


def test_malformed_messages_are_counted_answered_and_logged_once_a_second():
    broker = core()
    actions = broker.handle(Malformed(Face.CLIENTS, b"p", "no msgpack"), 0.0)
    assert [type(action) for action in actions] == [Send, Note]
    assert actions[0].message.error["code"] == ProtocolError.code
    for number in range(1000):
        assert broker.handle(Malformed(Face.CLIENTS, b"p", "again"), 0.5) == [], number
    assert broker.counters.malformed == {"clients": 1001}


def test_strangers_are_remembered_within_bounds():
    broker = core()
    for number in range(3000):
        broker.handle(Malformed(Face.CLIENTS, number.to_bytes(4), "x"), 0.0)
        say(broker, Heartbeat(step=1, busy=False), peer=number.to_bytes(4), face=Face.WORKERS)
    broker.validate()


def test_the_number_of_clients_is_bounded_and_idle_ones_make_room():
    world = World(max_clients=3)
    world.group()
    busy = world.client("busy")
    busy.submit(request(1, max_tokens=1000))
    idle = world.client("idle")
    idle.polite = idle.silent = False
    world.now += 1
    world.client("third")
    world.client("fourth")
    assert len(world.broker.delivery.connections) == 3
    idle.send(Ping())
    world.settle()
    assert isinstance(idle.errors[-1], ProtocolError)
    assert busy.peer in world.broker.delivery.connections


def test_a_client_too_many_is_told_when_nobody_is_idle():
    world = World(max_clients=2)
    world.group()
    for number in range(2):
        world.client(f"c{number}").submit(request(number + 1, max_tokens=1000))
    late = world.client("late")
    assert late.welcome is None
    assert isinstance(late.errors[0], OverloadedError)
    assert late.errors[0].retry_after


def test_idle_clients_are_forgotten_late_and_busy_silent_ones_soon():
    world = World(idle_client_timeout=100.0, client_silence=15.0)
    world.group()
    client = world.client()
    client.silent = True
    world.wait(90.0)
    assert client.peer in world.broker.delivery.connections
    world.wait(20.0)
    assert client.peer not in world.broker.delivery.connections


def test_questions_are_answered():
    world = World()
    client = world.client()
    client.send(Describe())
    world.settle()
    assert client.said[-1] == Cards(cards=())
    world.group()
    client.send(Describe())
    client.send(Ping(nonce=7))
    client.send(GetStatus())
    world.settle()
    cards, pong, status = client.said[-3:]
    assert [each.name for each in cards.cards] == ["m"]
    assert pong == Pong(nonce=7)
    assert isinstance(status, Status)


def test_a_hello_said_twice_changes_nothing():
    world = World()
    world.group()
    client = world.client()
    (record,) = client.submit(request(1))
    client.hello()
    world.finish([record])
    assert sum(isinstance(message, Welcome) for message in client.said) == 2


def test_stop_tells_everybody():
    world = World()
    group, client = world.group(), world.client()
    actions = world.broker.handle(Stop(), world.now)
    told = {action.peer: action.message for action in actions}
    error = from_wire(told[client.peer].error)
    assert isinstance(error, UnavailableError)
    assert error.retry_after
    assert isinstance(told[group.peer], Reset)
    assert not any(isinstance(message, Error) and message.request for message in told.values())


# ------------------------------------------------------------------------------------------------------ report


def test_the_report_says_what_is_going_on():
    world = World()
    group, client = world.group(rows=2), world.client()
    client.submit(*(request(n, prompt=(1,) * 5, max_tokens=50) for n in range(1, 5)))
    world.settle()
    world.step(3)
    group.beat(running=2, kv_blocks_free=10, name="left out")
    world.now += 2.0
    report = world.broker.report(world.now)
    assert report["broker"] == "run-1"
    assert report["uptime_seconds"] == 2.0
    assert report["models"] == [{"name": "m", "ready_groups": 1, "queue_depth": 2, "queue_tokens": 10, "running": 2}]
    (row,) = report["groups"]
    assert row == {
        "name": "g0",
        "model": "m",
        "state": "ready",
        "running": 2,
        "max_num_seqs": 2,
        "kv_tokens": 1 << 16,
        "load": {"running": 2, "kv_blocks_free": 10},
        "heartbeat_age_seconds": 2.0,
        "step": 3,
        "step_age_seconds": 2.0,
    }
    assert report["queue"] == {"depth": 2, "tokens": 10, "parked": 0}
    assert report["clients"] == 1
    assert report["requests"] == {"live": 4, "finished": 0}
    counters = report["counters"]
    assert counters["requests_total"] == 4
    assert counters["prompt_tokens_total"] == 20
    assert counters["tokens_total"] == 6
    assert all(name.endswith("_total") for name in counters)


def test_an_idle_group_does_not_look_stuck():
    world = World()
    world.group()
    world.wait(300.0)
    (row,) = world.broker.report(world.now)["groups"]
    assert row["step_age_seconds"] < 1.0
    assert world.broker.counters.redispatch == {}


def test_finished_requests_are_counted_by_reason_and_logged_without_their_text():
    world = World()
    world.group()
    client = world.client()
    world.run(client, request(1), request(3, ignore_eos=False, max_tokens=2000))
    assert world.broker.counters.finished == {"length": 1, "stop": 1}
    lines = [note.fields for note in world.notes if note.text == "request finished"]
    assert {"request", "model", "reason", "prompt_tokens", "tokens", "seconds"} == set(lines[0])


# ------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("name", "value"),
    [("heartbeat", 0), ("max_queued_requests", 0), ("window_bytes", -1), ("max_redispatch", -1), ("client_share", 1.5)],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        BrokerConfig(**{name: value})
    assert caught.value.param == name


def test_settings_may_be_zero_where_that_means_something():
    BrokerConfig(max_redispatch=0, suspect_steps=0, long_probation_steps=0, client_share=1.0)
