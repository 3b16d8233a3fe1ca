"""The broker's shell: two ROUTER sockets, one poller, one thread around the pure core. Decides nothing itself.

bind        take both addresses, or raise AddressError
run         turn after turn until stop: poll, drain both sockets, tick, send
stop        from any thread or signal handler
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import time
from types import TracebackType

import zmq

from headrace.broker.config import BrokerConfig
from headrace.broker.core import Broker
from headrace.broker.endpoints import Listener
from headrace.broker.events import (
    Action,
    Event,
    Face,
    Malformed,
    Note,
    PeerLost,
    Received,
    SendBlocked,
    Stop,
    Tick,
    TurnEnd,
)
from headrace.codec import decode, encode
from headrace.errors import InternalError, ProtocolError
from headrace.messages import CLIENT_TO_BROKER, LEADER_TO_BROKER, Error

__all__ = ["BrokerServer"]

logger = logging.getLogger(__name__)

_TICK = 0.1  # seconds between looks at the clock: the finest deadline the core keeps
_DRAIN = 256  # messages taken from one socket per turn, so that neither face starves the other
_HIGH_WATER = {Face.CLIENTS: 64, Face.WORKERS: 256}  # messages per peer and direction
_ALLOWED = {Face.CLIENTS: CLIENT_TO_BROKER, Face.WORKERS: LEADER_TO_BROKER}


class BrokerServer:
    """A broker that listens for clients and leaders.

    Args:
        client_endpoint: where to listen for clients.
        worker_endpoint: where to listen for leaders.
        config: limits and times.
        awake: seconds after a message during which it looks for the next one without sleeping. A core that slept is
            slow to wake and has cold caches, which costs a first token some tenths of a millisecond each way.

    Attributes:
        client_endpoint: where clients connect; after `bind` with the port in force.
        worker_endpoint: where leaders connect; likewise.
        core: the broker's state.
    """

    def __init__(
        self, client_endpoint: str, worker_endpoint: str, config: BrokerConfig | None = None, *, awake: float = 0.0
    ) -> None:
        self.client_endpoint = client_endpoint
        self.worker_endpoint = worker_endpoint
        self.core = Broker(config, name=f"{os.getpid():x}-{secrets.token_hex(4)}", rng=random.SystemRandom())
        self._awake = awake
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._listeners: dict[Face, Listener] = {}
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = False
        self._last_report = dict.fromkeys(Face, 0.0)

    def __enter__(self) -> BrokerServer:
        self.bind()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def bind(self) -> None:
        """Take both addresses; doing it twice does nothing.

        Raises:
            AddressError: an address is in use, unusable or unsafe.
        """
        if self._listeners:
            return
        # A context of its own: one cannot outlive the server, and forked children share nothing with it.
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4096)
        try:
            for face, endpoint in ((Face.CLIENTS, self.client_endpoint), (Face.WORKERS, self.worker_endpoint)):
                self._listeners[face] = Listener(self._context, endpoint, high_water=_HIGH_WATER[face])
        except BaseException:
            self.close()
            raise
        self.client_endpoint = self._listeners[Face.CLIENTS].endpoint
        self.worker_endpoint = self._listeners[Face.WORKERS].endpoint
        logger.info("broker listens for clients at %s, for workers at %s", self.client_endpoint, self.worker_endpoint)

    def run(self) -> None:
        """Serve until `stop`; then tell every peer, and give the addresses up."""
        self.bind()
        try:
            self._serve()
            self._handle(Stop(), time.monotonic())
        finally:
            self.close()

    def stop(self) -> None:
        """End `run` soon; safe from any thread and from signal handlers."""
        self._stopping = True
        with contextlib.suppress(OSError):  # full: a wake-up is on its way; closed: it ended already
            os.write(self._wake_out, b"x")

    def close(self) -> None:
        """Release sockets and descriptors; `run` does it by itself."""
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        if self._context is not None:
            self._context.term()
            self._context = None
        for fd in (self._wake_in, self._wake_out):
            if fd >= 0:
                os.close(fd)
        self._wake_in = self._wake_out = -1

    # ----------------------------------------------------------------------------------------------- one turn

    def _serve(self) -> None:
        poller = zmq.Poller()
        for listener in self._listeners.values():
            poller.register(listener.socket, zmq.POLLIN)
        poller.register(self._wake_in, zmq.POLLIN)
        next_tick = sleep_at = time.monotonic()
        more = False
        while not self._stopping:
            now = time.monotonic()
            wait = max(0.0, next_tick - now)
            ready = dict(poller.poll(0 if more or now < sleep_at else int(wait * 1000) + 1))
            if ready:
                sleep_at = now + self._awake
            elif wait and not more:
                continue
            more = False
            for face in (Face.WORKERS, Face.CLIENTS):
                if self._listeners[face].socket in ready:
                    more |= self._drain(face)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + _TICK
                self._handle(Tick(), now)
            self._handle(TurnEnd(), now)

    def _drain(self, face: Face) -> bool:
        """Feed what waits on one socket; whether some may be left."""
        receive = self._listeners[face].socket.recv_multipart
        now = time.monotonic()
        for _ in range(_DRAIN):
            try:
                peer, *frames = receive(zmq.NOBLOCK)
            except zmq.Again:
                return False
            try:
                message = decode(frames, _ALLOWED[face])
            except ProtocolError as error:
                self._handle(Malformed(face, peer, error.message), now)
            else:
                self._handle(Received(face, peer, message), now)
        return True

    def _handle(self, event: Event, now: float) -> None:
        try:
            actions = self.core.handle(event, now)
        except Exception:
            # A bug of ours costs the message that met it, not everybody's streams.
            logger.exception("the broker could not handle %s", type(event).__name__)
            if isinstance(event, Received):
                error = InternalError("The broker failed on this message; its log has the traceback.")
                self._send(event.face, event.peer, Error(error=error.to_wire()), set())
            return
        if actions:
            self._act(actions, now)

    def _act(self, actions: list[Action], now: float) -> None:
        blocked: set[tuple[Face, bytes]] = set()
        for action in actions:
            if type(action) is Note:
                logger.log(action.level, "%s %s", action.text, _fields(action.fields))
                continue
            assert not isinstance(action, Note)
            event = self._send(action.face, action.peer, action.message, blocked)
            if event is not None:
                self._handle(event, now)

    def _send(self, face: Face, peer: bytes, message: object, blocked: set[tuple[Face, bytes]]) -> Event | None:
        """Send one message; what went wrong, if something did."""
        if (face, peer) in blocked:  # it must not overtake the one that did not go
            return SendBlocked(face, peer, message)  # type: ignore[arg-type]
        try:
            frames = encode(message)  # type: ignore[arg-type]
            self._listeners[face].socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.Again:
            blocked.add((face, peer))
            return SendBlocked(face, peer, message)  # type: ignore[arg-type]
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return PeerLost(face, peer)
        except ProtocolError:
            logger.exception("a %s message could not be sent", type(message).__name__)
        return None


def _fields(fields: dict[str, object]) -> str:
    """Fields as `name=value`, control characters escaped: names come from peers."""
    return " ".join(
        f"{name}={value!r}" if isinstance(value, str) else f"{name}={value}" for name, value in fields.items()
    )
