"""Peers that are no peers: garbage, other protocols, floods and bombs, while an honest stream goes on undisturbed.

What libzmq does not bound: frames of one message that never ends. They gather in the I/O thread, below any limit that a
socket option sets, until the connection ends; that is why the sockets are open to their owner only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import psutil
import pytest
import zmq

from headrace.codec import MAX_BODY
from headrace.errors import ProtocolError, from_wire
from headrace.messages import Cancel, Error, Hello, Submit
from tests.broker.raw import PATIENCE, Leader, Peer, Serving, Stream, alive, ask, plain_socket, zmtp
from tests.broker.test_serve import PLACES, text
from tests.support.fake_group import FakeGroup

GREETINGS = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "noise": bytes(range(256)) * 40,
    "an old version of ZMTP": b"\x01\x00" + b"\x05hello",
    "another mechanism": b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32),
    "half a greeting": b"\xff\x00\x00",
    "no handshake": b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32) + b"\x00\xff" * 99,
}


@pytest.fixture(params=["ipc", "tcp"])
def broker(request, run_dir):
    with Serving(*PLACES[request.param](run_dir)) as serving:
        yield serving


@contextlib.contextmanager
def honest(broker, number: int = 9, count: int = 200):
    """A stream under way, from before the attack until after it."""
    stream = Stream(number, count)
    with FakeGroup(broker.workers, step_delay=0.005) as group, Peer(broker.clients) as peer:
        peer.greet()
        peer.send(Submit(requests=(stream.request,)))
        stream.read(peer, 5)
        yield
        stream.read(peer)
        assert sum(assignment.request == stream.request.id for assignment in group.assigned) == 1
    assert list(stream.tokens) == text(number, count)
    assert stream.attempt == 1


def rss() -> float:
    return psutil.Process().memory_info().rss / 2**20


def test_other_protocols_and_silent_connections_are_hung_up_on(broker):
    with honest(broker), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(plain_socket(broker.clients)) for _ in range(150)]
        strangers = {}
        for name, greeting in GREETINGS.items():
            for endpoint in (broker.clients, broker.workers):
                raw = strangers[name, endpoint] = stack.enter_context(plain_socket(endpoint))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    raw.sendall(greeting)
        assert ask(broker.clients, 1) == text(1)
        for raw in (*strangers.values(), *silent):
            _until_hung_up(raw)
        assert ask(broker.clients, 2) == text(2)


def _until_hung_up(raw: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while raw.recv(4096):
            pass


NONSENSE = {
    "no frames to speak of": [b""],
    "one frame": [b"Hello"],
    "many frames": [b"Hello"] * 10_000,
    "an unknown kind": [b"Bogus", b"\x80"],
    "a kind as long as a book": [b"x" * 1_000_000, b"\x80"],
    "no msgpack": [b"Hello", b"\xc1\xff"],
    "a bomb of empty maps": [b"Submit", b"\xdd\x00\x10\x00\x00" + b"\x80" * (1 << 20)],
    "a hundred thousand levels": [b"Submit", b"\x91" * 100_000],
    "forged lengths": [b"Submit", b"\x81\xa8requests\xdd\xff\xff\xff\xff"],
    "nested lists that claim room": [b"Submit", b"\xdc\x36\xb0" * 5000],
    "an extension": [b"Submit", b"\xd4\x05\x00"],
    "a missing field": [b"Submit", b"\x80"],
    "a mistyped field": [b"Hello", b"\x81\xa7version\xa1x"],
}


def test_nonsense_is_answered_with_a_typed_error(broker):
    with honest(broker):
        for name, frames in NONSENSE.items():
            with Peer(broker.clients) as peer, Leader(broker.workers) as leader:
                peer.greet()
                for each in (peer, leader):
                    each.socket.send_multipart(frames)
                    assert type(from_wire(each.receive(Error).error)) is ProtocolError, name
                assert alive(peer)


def test_thousands_of_malformed_messages_disturb_nobody(broker, caplog):
    count = 3000
    with honest(broker), Peer(broker.clients) as peer, Leader(broker.workers) as leader:
        peer.greet()
        bodies = list(NONSENSE.values())
        for number in range(count):
            for each in (peer, leader):
                each.socket.send_multipart(bodies[number % len(bodies)] if number % 100 == 0 else bodies[3])
        assert ask(broker.clients, 1) == text(1)
        for _ in range(int(PATIENCE * 10)):
            counted = broker.server.core.counters.malformed
            if counted == {"clients": count, "workers": count}:
                break
            peer.socket.poll(100)
        assert counted == {"clients": count, "workers": count}
    lines = sum("malformed message" in record.getMessage() for record in caplog.records)
    assert 2 <= lines < 200


def test_a_frame_beyond_the_limit_costs_its_sender_the_connection(broker):
    before = rss()
    with honest(broker), Peer(broker.clients) as peer:
        peer.greet()
        events = peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        peer.socket.send_multipart([b"Submit", bytes(MAX_BODY + 1)])
        assert events.poll(int(PATIENCE * 1000))
        peer.socket.disable_monitor()
        events.close()
        peer.greet()  # the socket reconnected by itself
        assert alive(peer)
    assert rss() - before < 100


def test_a_message_without_end_is_dropped_with_its_connection(broker):
    """Bounded by what its sender is willing to send only, which no option of libzmq changes (see the module's text)."""
    with honest(broker):
        before = rss()
        raw = zmtp(broker.clients)
        frame = b"\x03" + (1000).to_bytes(8, "big") + bytes(1000)  # flags: more, long
        for _ in range(50):
            raw.sendall(frame * 400)
        grown = rss() - before
        raw.close()
        assert ask(broker.clients, 1) == text(1)
        assert grown < 100
        assert broker.server.core.counters.malformed == {}


def test_connections_that_come_and_go_leave_nothing_behind(broker):
    with honest(broker):
        before = psutil.Process().num_fds()
        for number in range(200):
            with Peer(broker.clients) as peer:
                peer.greet() if number % 2 else peer.send(Hello())
        assert ask(broker.clients, 1) == text(1)
        for _ in range(int(PATIENCE * 10)):
            if psutil.Process().num_fds() <= before:
                break
            threading.Event().wait(0.1)
        assert psutil.Process().num_fds() <= before


def test_a_client_cannot_end_what_it_cannot_name(broker):
    with honest(broker), Peer(broker.clients) as peer:
        peer.greet()
        peer.send(Cancel(requests=tuple(os.urandom(16) for _ in range(1000))))
        assert alive(peer)
