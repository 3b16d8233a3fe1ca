"""Peers of a real broker that are nothing but a socket: they say and read what a test wants, however wrong."""

from __future__ import annotations

import socket
import threading
import time
from array import array
from typing import Any

import zmq

from headrace.broker.config import BrokerConfig
from headrace.broker.serve import BrokerServer
from headrace.codec import decode, encode
from headrace.messages import (
    BROKER_TO_CLIENT,
    BROKER_TO_LEADER,
    Ack,
    Credit,
    Done,
    Error,
    Hello,
    Ping,
    Request,
    Submit,
    Tokens,
    Welcome,
    pack_tokens,
    unpack_tokens,
)

PATIENCE = 60.0


class Peer:
    """A DEALER."""

    def __init__(self, endpoint: str, face=BROKER_TO_CLIENT, **options: int) -> None:
        self.face = face
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def send(self, message: Any) -> None:
        """Say something well-formed."""
        self.socket.send_multipart(encode(message))

    def receive(self, kind: type | None = None, patience: float = PATIENCE) -> Any:
        """The next message, or the next of a kind."""
        until = time.monotonic() + patience
        while (left := until - time.monotonic()) > 0:
            if self.socket.poll(int(left * 1000) + 1):
                message = decode(self.socket.recv_multipart(), self.face)
                if kind is None or isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind} within {patience} s")

    def greet(self) -> Welcome:
        """Say hello until there is an answer."""
        self.send(Hello())
        return self.receive(Welcome)


class Leader(Peer):
    """A DEALER at the workers' face."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, BROKER_TO_LEADER)


class Stream:
    """One request read to its end, over whatever connections it takes."""

    def __init__(self, number: int, max_tokens: int = 50, model: str = "fake") -> None:
        self.request = Request(
            id=number.to_bytes(16),
            model=model,
            prompt=pack_tokens([1, 2, 3]),
            sampling={"max_tokens": max_tokens, "seed": number, "ignore_eos": True},
        )
        self.tokens = array("I")
        self.attempt = 0
        self.reason: str | None = None

    def again(self) -> Request:
        """The request for a broker that does not know it."""
        first = self.request
        return Request(
            id=first.id,
            model=first.model,
            prompt=first.prompt,
            sampling=first.sampling,
            output=(pack_tokens(self.tokens),) if self.tokens else (),
            attempt=self.attempt,
            fingerprint="f0" if self.tokens else "",
        )

    def read(self, peer: Peer, tokens: int = 1 << 30) -> None:
        """Read until there are that many tokens or the end."""
        while self.reason is None and len(self.tokens) < tokens:
            message = peer.receive()
            if isinstance(message, Tokens):
                for run in message.runs:
                    self._take(run)
                peer.send(Credit(acks=(Ack(self.request.id, 0, len(self.tokens), False),)))
            elif isinstance(message, Done):
                (finish,) = message.finishes
                assert finish.total == len(self.tokens)
                self.reason = finish.reason
            else:
                assert not isinstance(message, Error), message

    def _take(self, run: Any) -> None:
        if run.request == self.request.id and run.attempt >= self.attempt:
            self.attempt = run.attempt
            known = len(self.tokens) - run.first
            assert known >= 0, "a gap"
            self.tokens.extend(unpack_tokens(run.tokens)[known:])


def ask(endpoint: str, number: int, max_tokens: int = 50) -> list[int]:
    """One whole stream of a client of its own."""
    stream = Stream(number, max_tokens)
    with Peer(endpoint) as peer:
        peer.greet()
        peer.send(Submit(requests=(stream.request,)))
        stream.read(peer)
    return list(stream.tokens)


def alive(peer: Peer, nonce: int = 1) -> bool:
    """Whether the broker answers this client."""
    peer.send(Ping(nonce=nonce))
    return peer.receive() is not None


class Serving:
    """A broker in a thread."""

    def __init__(
        self, client_endpoint: str, worker_endpoint: str, config: BrokerConfig | None = None, *, awake: float = 0.0
    ) -> None:
        self.server = BrokerServer(client_endpoint, worker_endpoint, config, awake=awake)
        self.thread = threading.Thread(target=self.server.run, name="broker")

    def __enter__(self) -> Serving:
        self.server.bind()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    @property
    def clients(self) -> str:
        """Where clients connect."""
        return self.server.client_endpoint

    @property
    def workers(self) -> str:
        """Where leaders connect."""
        return self.server.worker_endpoint


def plain_socket(endpoint: str) -> socket.socket:
    """A connection without ZeroMQ."""
    if endpoint.startswith("ipc://"):
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.connect(endpoint.removeprefix("ipc://"))
    else:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        raw = socket.create_connection((host, int(port)))
    raw.settimeout(PATIENCE)
    return raw


def zmtp(endpoint: str) -> socket.socket:
    """A hand-made ZMTP 3.0 DEALER without any manners, after its handshake."""
    raw = plain_socket(endpoint)
    raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31))
    _read(raw, 64)
    body = b"\x05READY" + b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER" + b"\x08Identity" + bytes(4)
    raw.sendall(b"\x04" + bytes([len(body)]) + body)
    head = _read(raw, 2)
    _read(raw, head[1])
    return raw


def _read(raw: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = raw.recv(size - len(data))
        assert part, "the peer hung up during the handshake"
        data += part
    return data
