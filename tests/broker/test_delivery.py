"""Delivery to clients: windows, cursors that move back, and the mail for peers whose pipes are full."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.broker.events import Face, Note, PeerLost, Send, TurnEnd
from headrace.broker.mail import MAX_BACKLOG, Mailer
from headrace.errors import RequestCancelledError
from headrace.messages import Accepted, Ack, Assign, Blob, Credit, Done, GetBlob, Ping, Pong, Submit, Tokens
from tests.broker.world import World, card, finals, request, runs, text


def test_one_message_per_client_and_turn_carries_all_its_streams():
    world = World()
    world.group("g0", rows=4)
    world.group("g1", rows=4)
    client = world.client()
    client.submit(*(request(n, prompt=(n,)) for n in range(1, 9)))
    world.settle()
    client.said.clear()
    world.step(1)
    (tokens,) = [message for message in client.said if isinstance(message, Tokens)]
    assert len(tokens.runs) == 8


def test_a_long_backlog_is_sent_in_pieces_that_fit_the_codec():
    world = World(window_bytes=1 << 20)
    world.group(rows=64, kv_tokens=1 << 20, model=card(max_model_len=100_000))
    client = world.client()
    records = client.submit(*(request(n, max_tokens=600) for n in range(1, 65)))
    world.settle()
    world.blocked.add(client.peer)
    world.step(600)
    world.blocked.clear()
    world.tick()
    sizes = [sum(len(run.tokens) for run in m.runs) for m in client.said if isinstance(m, Tokens)]
    assert sum(sizes) == 64 * 600 * 4
    assert 32 << 10 < max(sizes) <= 64 << 10
    world.finish(records)


@given(
    window=st.integers(4, 300),
    streams=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    logprobs=st.sampled_from([None, 0, 2]),
)
def test_the_window_is_never_exceeded_and_everything_arrives(window, streams, seed, logprobs):
    """`World` validates after each event that no more is under way than the window, and how much that is."""
    rng = random.Random(seed)
    world = World(window_bytes=window)
    world.group(rows=8)
    client = world.client()
    lengths = [rng.randint(1, 40) for _ in range(streams)]
    records = client.submit(*(request(n, max_tokens=m, logprobs=logprobs) for n, m in enumerate(lengths, 1)))
    for _ in range(30):
        client.acks = rng.random() < 0.5
        world.step(rng.randint(1, 5))
        if client.acks:
            client.confirm(*records)
    client.acks = True
    client.confirm(*records)
    world.finish(records)
    for number, record in enumerate(records, 1):
        assert list(record.tokens[0]) == text(number, 0, record.max_tokens)[0]
        assert len(record.logprobs[0]) == (0 if logprobs is None else record.max_tokens)


def test_acknowledgements_that_make_no_sense_change_nothing():
    world = World(window_bytes=40)
    world.group()
    client = world.client()
    client.acks = False
    (record,) = client.submit(request(1, max_tokens=50))
    world.settle()
    world.step(20)
    id = record.request.id
    for ack in (Ack(id, 0, 11, False), Ack(id, 0, -5, False), Ack(id, 9, 5, False), Ack(id, -1, 5, False)):
        client.send(Credit(acks=(ack, Ack(b"?", 0, 5, True))))
        world.settle()
    assert len(record.tokens[0]) == 10
    client.send(Credit(acks=(Ack(id, 0, 10, True),)))
    world.settle()
    assert len(record.tokens[0]) == 20


def test_a_blocked_client_gets_everything_in_order_once_it_reads():
    world = World()
    world.group(rows=4)
    client = world.client()
    world.blocked.add(client.peer)
    records = client.submit(*(request(n) for n in range(1, 4)))
    world.settle()
    world.step(20)
    world.wait(2.0)
    assert not any(record.tokens[0] for record in records)
    world.blocked.clear()
    world.tick()
    world.finish(records)
    kinds = [type(message) for message in client.said if not isinstance(message, Pong)]
    assert kinds.index(Accepted) < kinds.index(Tokens) < kinds.index(Done)
    assert len(finals(client)) == 3
    assert [run.first for run in runs(client)] == [0, 0, 0]


def test_an_error_for_a_blocked_client_is_not_lost():
    world = World()
    world.group(rows=1)
    client = world.client()
    _, late = client.submit(request(1, max_tokens=100), request(2, budget_ms=500))
    world.settle()
    world.blocked.add(client.peer)
    world.wait(2.0)
    assert late.error is None
    world.blocked.clear()
    world.tick()
    assert late.error is not None


def test_a_client_that_reads_nothing_at_all_is_given_up():
    world = World()
    world.group()
    client = world.client()
    world.blocked.add(client.peer)
    for number in range(3 * MAX_BACKLOG):
        client.send(Ping(nonce=number))
    world.tick()
    world.tick()
    assert client.peer not in world.broker.delivery.connections


def test_parts_of_blobs_for_a_client_that_reads_nothing_are_few():
    """They are a megabyte each."""
    world = World()
    data = bytes(3000)
    group = world.group(blobs=(data,))
    group.card = card(blobs={"tokenizer.json": next(iter(group.blobs))})
    group.hello()
    world.settle()
    client = world.client()
    world.blocked.add(client.peer)
    for _ in range(100):
        client.send(GetBlob(hash=next(iter(group.blobs))))
    world.tick()
    world.tick()
    assert client.peer not in world.broker.delivery.connections


# ---------------------------------------------------------------------------------------------------- the mailer


def numbers(actions) -> list[int]:
    return [action.message.nonce for action in actions if isinstance(action, Send)]


def test_mail_keeps_its_order_over_any_pattern_of_blocking():
    """Also when new messages come while old ones are tried again."""
    for seed in range(200):
        rng = random.Random(seed)
        mailer, received, sent = Mailer(), [], 0
        for _ in range(30):
            for _ in range(rng.randrange(40)):
                mailer.send(Face.CLIENTS, b"p", Ping(nonce=sent))
                sent += 1
            if rng.random() < 0.5:
                mailer.retry()
            room = rng.choice([0, 1, 5, 1000])
            for action in mailer.take():
                if room > 0:
                    room -= 1
                    received.append(action.message.nonce)
                else:
                    room = -1
                    mailer.block(Face.CLIENTS, b"p", action.message)
                    if rng.random() < 0.3:
                        mailer.send(Face.CLIENTS, b"p", Ping(nonce=sent))
                        sent += 1
        for _ in range(20):
            mailer.retry()
            received += numbers(mailer.take())
        assert received == sorted(received) == list(range(sent))


def test_mail_for_others_is_not_held_up():
    mailer = Mailer()
    mailer.block(Face.CLIENTS, b"p", Ping(nonce=1))
    mailer.send(Face.CLIENTS, b"q", Ping(nonce=2))
    mailer.send(Face.WORKERS, b"p", Ping(nonce=3))
    assert numbers(mailer.take()) == [2, 3]
    assert mailer.is_blocked(Face.CLIENTS, b"p")
    assert not mailer.is_blocked(Face.WORKERS, b"p")


def test_mail_of_a_peer_that_is_gone_is_dropped():
    mailer = Mailer()
    mailer.block(Face.CLIENTS, b"p", Ping(nonce=1))
    mailer.drop(Face.CLIENTS, b"p")
    mailer.retry()
    assert mailer.take() == []
    assert not mailer.is_blocked(Face.CLIENTS, b"p")


def test_mail_is_weighed():
    mailer = Mailer()
    for _ in range(MAX_BACKLOG):
        mailer.block(Face.CLIENTS, b"p", Ping())
    assert mailer.overflowing() == []
    mailer.block(Face.CLIENTS, b"p", Blob(hash="", offset=0, total=0, data=b""))
    assert mailer.overflowing() == [(Face.CLIENTS, b"p")]


def test_notes_are_actions_like_others():
    mailer = Mailer()
    mailer.note(20, "text", number=1)
    assert mailer.take() == [Note(20, "text", {"number": 1})]


def test_a_cancel_that_comes_after_the_end_still_opens_the_window():
    """The broker took such a cancel for late news, and what was never to be confirmed filled the window for good."""
    world = World(window_bytes=40)
    world.group()
    client = world.client()
    client.acks = False
    (left,) = client.submit(request(1, max_tokens=20))
    world.settle()
    world.step(22)
    (conn,) = world.broker.delivery.connections.values()
    assert left.request.id in world.broker.jobs.ended
    assert conn.unacked == 40
    client.cancel(left)
    assert conn.unacked == 0
    assert not conn.jobs


@pytest.mark.parametrize("settings", [{"budget_ms": 500}, {"max_tokens": 20}], ids=["an error", "a good end"])
def test_a_cancel_is_acknowledged_when_the_end_was_not_told_yet(settings):
    world = World(window_bytes=40)
    world.group()
    client = world.client()
    client.acks = False
    (record,) = client.submit(request(1, **settings))
    world.settle()
    world.step(settings.get("max_tokens", 1))
    world.blocked.add(client.peer)
    world.wait(1.0)
    assert record.request.id in world.broker.jobs.ended
    client.cancel(record)
    world.blocked.clear()
    world.wait(1.0)
    assert isinstance(record.error, RequestCancelledError)
    assert not world.broker.delivery.connections[client.peer].jobs


def test_a_group_hears_of_a_request_before_its_client_hears_that_it_was_accepted():
    """The group has work to do, the client only waits: what is said first arrives first."""
    world = World()
    group = world.group()
    client = world.client()
    world.settle()
    world.receive(Face.CLIENTS, client.peer, Submit(requests=(request(1), request(2))))
    actions = [action for action in world.broker.handle(TurnEnd(), world.now) if isinstance(action, Send)]
    assert [(action.peer, type(action.message)) for action in actions] == [
        (group.peer, Assign),
        (client.peer, Accepted),
    ]


def test_nothing_is_accepted_for_a_client_that_is_gone_by_the_end_of_the_turn():
    world = World()
    client = world.client()
    world.group()
    world.settle()
    world.receive(Face.CLIENTS, client.peer, Submit(requests=(request(1),)))
    world.feed(PeerLost(Face.CLIENTS, client.peer))
    actions = world.broker.handle(TurnEnd(), world.now)
    assert not any(isinstance(action, Send) and action.face is Face.CLIENTS for action in actions)
