"""The processes around a broker under measurement: groups that compute nothing, readers that only count.

Every token is the time at which its leader sent it, in microseconds, so a reader knows how long it was under way: the
monotonic clock is the same in all processes of a machine.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgpack
import zmq

from headrace.card import ModelCard
from headrace.codec import decode, encode
from headrace.messages import (
    BROKER_TO_LEADER,
    Ack,
    Assign,
    Credit,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Hello,
    Ping,
    Request,
    Revoke,
    StreamId,
    Submit,
)
from headrace.processes import parent

__all__ = ["group", "hop", "reader", "serve"]

_CLOCK = 0xFFFFFFFF
_ENDLESS = 1 << 30
_ACK_TOKENS = 64
_ACK_SECONDS = 0.25
_HIGH_WATER = 8  # messages under way to the broker: more would only wait there


def serve(clients: str, workers: str) -> None:
    """A broker."""
    from headrace.broker.serve import BrokerServer

    server = BrokerServer(clients, workers)
    server.bind()
    _parent().ready(clients=server.client_endpoint, workers=server.worker_endpoint)
    server.run()


def group(endpoint: str, name: str, rows: int, pace: float) -> None:
    """A worker group: a token for every row in each step, a step every `pace` seconds, 0 for as fast as they go."""
    card = ModelCard(
        name="echo", architecture="Echo", family="echo", fingerprint="e", vocab_size=1 << 32, max_model_len=1 << 31
    )
    socket = _socket(zmq.DEALER)
    socket.connect(endpoint)
    hello = GroupHello(group=name, card=card, max_num_seqs=rows, kv_tokens=1 << 31)
    socket.send_multipart(encode(hello))
    ours: dict[StreamId, list[Any]] = {}
    step, beat_at, step_at = 0, 0.0, time.monotonic()
    while True:
        now = time.monotonic()
        wait = step_at - now if ours else 0.1
        while socket.poll(int(max(0.0, wait) * 1000)):
            wait = 0.0
            message = decode(socket.recv_multipart(), BROKER_TO_LEADER)
            if isinstance(message, Assign):
                for a in message.assignments:
                    ours[StreamId(a.request, a.choice, a.attempt)] = [a.request, a.choice, a.attempt, 0, b"", None]
            elif isinstance(message, Revoke):
                for stream in message.streams:
                    ours.pop(stream, None)
            elif isinstance(message, GroupWelcome):
                _parent().ready()
        now = time.monotonic()
        if now >= beat_at:
            beat_at = now + 0.5
            socket.send_multipart(encode(Heartbeat(step=step, busy=bool(ours))))
        if ours and now >= step_at:
            step_at = max(step_at + pace, now)
            step += 1
            _step(socket, list(ours.values()), step)


def _step(socket: zmq.Socket[bytes], rows: list[list[Any]], step: int) -> None:
    stamp = (time.monotonic_ns() // 1000 & _CLOCK).to_bytes(4, "little")
    for row in rows:
        row[4] = stamp
    socket.send_multipart([b"Tokens", msgpack.packb({"runs": rows, "step": step})])
    for row in rows:
        row[3] += 1


def reader(endpoint: str, streams: int) -> None:
    """A client with endless streams; told to "measure" it says what came in that time."""
    socket = _socket(zmq.DEALER)
    socket.connect(endpoint)
    socket.send_multipart(encode(Hello()))
    sampling = {"max_tokens": _ENDLESS, "ignore_eos": True, "seed": 1}
    requests = [
        Request(id=secrets.token_bytes(16), model="echo", prompt=bytes(256), sampling=sampling) for _ in range(streams)
    ]
    socket.send_multipart(encode(Submit(requests=tuple(requests))))
    _read(socket, _Acks({request.id: 0 for request in requests}))


def hop(endpoint: str, rows: int, pace: float, sender: bool) -> None:
    """One end of a bare connection on which the same messages travel: a DEALER that sends, or a ROUTER that reads."""
    if not sender:
        socket = _socket(zmq.ROUTER)
        socket.bind(endpoint)
        _parent().ready()
        _read(socket, None)
    socket = _socket(zmq.DEALER)
    socket.connect(endpoint)
    ours = [[secrets.token_bytes(16), 0, 1, 0, b"", None] for _ in range(rows)]
    step, step_at = 0, time.monotonic()
    while True:
        time.sleep(max(0.0, step_at - time.monotonic()))
        step_at = max(step_at + pace, time.monotonic())
        step += 1
        _step(socket, ours, step)


class _Acks:
    """Positions of a client's streams, confirmed as the library does it: after 64 tokens or a quarter of a second."""

    def __init__(self, positions: dict[bytes, int]) -> None:
        self.positions = positions
        self._said = dict(positions)
        self._due = 0.0

    def take(self, request: bytes, first: int, count: int) -> bool:
        """Note tokens that came; whether it is time to confirm."""
        assert self.positions[request] == first, "a gap or a repeat"
        self.positions[request] = first + count
        return first + count - self._said[request] >= _ACK_TOKENS

    def say(self, socket: zmq.Socket[bytes], now: float, *, urgent: bool) -> None:
        """Confirm if it is time."""
        if urgent or now >= self._due:
            self._due = now + _ACK_SECONDS
            acks = tuple(Ack(id, 0, at, False) for id, at in self.positions.items() if at > self._said[id])
            self._said.update(self.positions)
            socket.send_multipart(encode(Credit(acks=acks) if acks else Ping()))


def _read(socket: zmq.Socket[bytes], acks: _Acks | None) -> None:
    """Count tokens and how long they took, from each "measure" until its time is over."""
    boss = _parent()
    until, started, tokens, delays = 0.0, 0.0, 0, []
    seen = False
    while True:
        if socket.poll(50):
            *_, kind, body = socket.recv_multipart()
            now = time.monotonic()
            if kind == b"Tokens":
                runs = msgpack.unpackb(body)["runs"]
                urgent = False
                for request, _, _, first, data, _ in runs:
                    tokens += len(data) >> 2
                    if acks is not None:
                        urgent |= acks.take(request, first, len(data) >> 2)
                delays.append((int(now * 1e6) - int.from_bytes(runs[-1][4][-4:], "little")) & _CLOCK)
                if acks is not None:
                    acks.say(socket, now, urgent=urgent)
                if not seen:
                    seen = True
                    boss.send("flowing")
        now = time.monotonic()
        if until and now >= until:
            boss.send("measured", tokens=tokens, seconds=now - started, delays=sorted(delays))
            until = 0.0
        while (order := boss.receive(0)) is not None:
            started, until, tokens, delays = now, now + order["seconds"], 0, []


def _socket(kind: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.set_hwm(_HIGH_WATER)
    return socket


def _parent() -> Any:
    boss = parent()
    assert boss is not None
    return boss
