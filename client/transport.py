"""The one thread that owns the socket: carries wishes to the session, messages to the broker and news to the callers.

It decides nothing; that is `headrace.client.session`. Any thread may call it, also from a finalizer: nothing here that
a caller runs takes a lock that it could already hold.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from headrace.client.events import (
    Ask,
    Close,
    Connect,
    Disconnect,
    Drop,
    Emit,
    Event,
    Failed,
    LinkFailed,
    News,
    Received,
    Send,
    Spec,
    Start,
    Tick,
)
from headrace.client.session import Session
from headrace.errors import AddressError, ConfigError, HeadraceError, InternalError, ProtocolError
from headrace.messages import BROKER_TO_CLIENT, Error, Message

if TYPE_CHECKING:
    import asyncio

__all__ = ["Sink", "Transport"]

_DRAIN = 256  # messages per turn, so that callers' wishes are heard during a flood
_LINGER_MS = 250  # for the last cancels when the client closes


class Sink(Protocol):
    """Where news of one ticket go: called in `loop`, or in the transport's thread if that is None."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of the reader."""

    def put(self, news: News) -> None:
        """Take news; must not block or raise."""


class Transport:
    """Runs a session over a DEALER socket, in a thread that starts with the first wish and ends with `close`."""

    def __init__(self, endpoint: str, session: Session) -> None:
        self._endpoint = endpoint
        self._session = session
        self._pid = os.getpid()
        self._tickets = itertools.count(1)
        self._wishes: deque[Event] = deque()
        self._rung = False  # the thread was woken and has not looked at the wishes yet
        self._sinks: dict[int, Sink] = {}
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._over = False
        self._bell: socket.socket | None = None

    # ------------------------------------------------------------------------------------------------ any thread

    def start(self, requests: Iterable[tuple[Spec, Sink]]) -> list[int]:
        """Submit requests together; returns their tickets."""
        named = [(next(self._tickets), spec, sink) for spec, sink in requests]
        self._wish({ticket: sink for ticket, _, sink in named}, Start(tuple((t, spec) for t, spec, _ in named)))
        return [ticket for ticket, _, _ in named]

    def ask(self, question: Message, sink: Sink) -> int:
        """Send a question; the sink gets an Answer or Failed."""
        ticket = next(self._tickets)
        self._wish({ticket: sink}, Ask(ticket, question))
        return ticket

    def drop(self, ticket: int) -> None:
        """Cancel what is left of a ticket; its sink hears nothing more. Harmless at any time, from anywhere."""
        if self._sinks.pop(ticket, None) is not None and os.getpid() == self._pid:
            self._wishes.append(Drop(ticket))
            self._ring()

    @property
    def closed(self) -> bool:
        """Whether it takes no more wishes."""
        return self._closed

    def stop(self) -> None:
        """Cancel everything and let the thread end. Harmless when repeated."""
        if os.getpid() != self._pid:
            return  # the thread and the socket belong to the parent process
        with self._starting:
            self._closed = True
        self._wishes.append(Close())
        self._ring()

    def join(self) -> None:
        """Wait until the thread has ended."""
        thread = self._thread
        # The last reference to a client may go in a sink, and that runs in the thread itself.
        if os.getpid() == self._pid and thread is not None and thread is not threading.current_thread():
            thread.join()

    def check(self) -> None:
        """Refuse to work where it cannot.

        Raises:
            ConfigError: the client is closed, or this is a fork of the process that made it.
        """
        if os.getpid() != self._pid:
            raise ConfigError(
                f"This client was made in process {self._pid}, which forked; its thread and socket did not come along. "
                "Make a client in each process, after the fork."
            )
        if self._closed:
            raise ConfigError("This client is closed; make a new one.")

    def _wish(self, sinks: dict[int, Sink], wish: Event) -> None:
        self.check()
        self._sinks.update(sinks)
        self._wishes.append(wish)
        self._ensure_thread()
        self._ring()
        if self._over:  # it closed in the meantime and will not read this
            self._fail_all(ConfigError("This client is closed; make a new one."))

    def _ensure_thread(self) -> None:
        if self._thread is not None:
            return
        import zmq  # noqa: F401  tens of milliseconds, spent here and not in the thread's first turn

        with self._starting:
            self.check()
            if self._thread is None:
                self._bell, listener = socket.socketpair()
                self._bell.setblocking(False)
                listener.setblocking(False)
                self._thread = threading.Thread(target=self._run, args=(listener,), name="headrace-client", daemon=True)
                self._thread.start()

    def _ring(self) -> None:
        # Who comes between a ring and the thread's look is seen without one of its own, for wishes come before rings. A
        # full pipe means the thread will wake anyway, a closed one that it is gone.
        if self._bell is not None and not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):
                self._bell.send(b"!")

    # --------------------------------------------------------------------------------------------- the I/O thread

    def _run(self, listener: socket.socket) -> None:
        io = _Io(self._endpoint, listener)
        error: HeadraceError = ConfigError("This client is closed; make a new one.")
        try:
            while not io.finished:
                self._turn(io)
        except Exception as fault:
            error = InternalError(f"The client's thread failed: {type(fault).__name__}: {fault}. Make a new client.")
            error.__cause__ = fault
            self._closed = True
        finally:
            io.close()
            if self._bell is not None:
                self._bell.close()
            self._over = True
            self._fail_all(error)

    def _turn(self, io: _Io) -> None:
        """Wait, hear the callers, hear the broker, look at the clock, tell the callers."""
        io.wait(self._session.wake_at())
        now = time.monotonic()
        news: list[Emit] = []
        self._rung = False
        while self._wishes:
            self._feed(self._next_wish(), now, io, news)
        io.flush()
        for event in io.received():
            self._feed(event, now, io, news)
        self._feed(Tick(), now, io, news)
        self._deliver(news)  # before the receipts for it, which nobody waits for
        io.flush()

    def _next_wish(self) -> Event:
        """The oldest wish; requests that follow each other are one, for each message is a chance to lose the
        interpreter to callers that are still wishing, and to wait for it."""
        wish = self._wishes.popleft()
        if isinstance(wish, Start):
            requests = [*wish.requests]
            while self._wishes and isinstance(following := self._wishes[0], Start):
                requests += following.requests
                self._wishes.popleft()
            return Start(tuple(requests))
        return wish

    def _feed(self, event: Event, now: float, io: _Io, news: list[Emit]) -> None:
        for action in self._session.handle(event, now):
            match action:
                case Emit():
                    news.append(action)
                case Send():
                    io.send(action.message)
                case Connect():
                    if (error := io.connect()) is not None:
                        self._feed(LinkFailed(error), now, io, news)
                        return
                case Disconnect():
                    io.disconnect()
        if isinstance(event, Close):
            io.finished = True

    def _deliver(self, news: list[Emit]) -> None:
        """Hand news over, to each event loop in one call: a wake-up per token would cost more than the token."""
        by_loop: dict[Any, list[tuple[Sink, News]]] = {}
        for ticket, item, last in news:
            sink = self._sinks.pop(ticket, None) if last else self._sinks.get(ticket)
            if sink is None:
                continue
            if sink.loop is None:
                sink.put(item)
            else:
                by_loop.setdefault(sink.loop, []).append((sink, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop was closed with streams open
                for ticket in [t for t, sink in list(self._sinks.items()) if sink.loop is loop]:
                    self.drop(ticket)

    def _fail_all(self, error: HeadraceError) -> None:
        self._deliver([Emit(ticket, Failed(error), True) for ticket in list(self._sinks)])


def _put_all(batch: list[tuple[Sink, News]]) -> None:
    for sink, news in batch:
        sink.put(news)


class _Io:
    """Poller and sockets of the thread; knows frames, not what they mean."""

    def __init__(self, endpoint: str, listener: socket.socket) -> None:
        import zmq

        self._zmq = zmq
        self._endpoint = endpoint
        self._listener = listener
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(listener.fileno(), zmq.POLLIN)
        self._socket: Any = None
        self._outgoing: list[list[bytes]] = []
        self.finished = False

    def wait(self, until: float | None) -> None:
        """Sleep until something comes or the time does."""
        timeout = None if until is None else max(0, int((until - time.monotonic()) * 1000) + 1)
        ready = dict(self._poller.poll(timeout))
        if self._listener.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                while len(self._listener.recv(4096)) == 4096:
                    pass

    def received(self) -> Iterable[Event]:
        """What the broker sent."""
        from headrace.codec import decode

        for _ in range(_DRAIN):
            if self._socket is None:
                return
            try:
                frames = self._socket.recv_multipart(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return
            try:
                yield Received(decode(frames, BROKER_TO_CLIENT))
            except ProtocolError as error:
                yield Received(Error(error=error.to_wire()))

    def send(self, message: Message) -> None:
        """Say this with the next `flush`."""
        from headrace.codec import encode

        if self._socket is not None:
            self._outgoing.append(encode(message))

    def flush(self) -> None:
        """Queue what is to be said; the queue is as long as the callers' wishes, and dies with the connection."""
        for frames in self._outgoing:
            self._socket.send_multipart(frames, self._zmq.NOBLOCK)
        self._outgoing.clear()

    def connect(self) -> HeadraceError | None:
        """Open a new socket; the error if the endpoint is not one."""
        from headrace.codec import MAX_BODY

        zmq = self._zmq
        sock = self._context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.SNDHWM, 0)
        sock.setsockopt(zmq.RCVHWM, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_BODY)
        sock.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        try:
            sock.connect(self._endpoint)
        except zmq.ZMQError as error:
            sock.close()
            return AddressError(
                f"{self._endpoint!r} is not an endpoint to connect to ({error}); "
                "write ipc:///path/to.sock or tcp://127.0.0.1:PORT."
            )
        self._socket = sock
        self._poller.register(sock, zmq.POLLIN)
        return None

    def disconnect(self) -> None:
        """Close the socket with all it holds, at the client's end after a moment for the last words."""
        if self._socket is not None:
            self.flush()
            self._poller.unregister(self._socket)
            self._socket.close(linger=_LINGER_MS if self.finished else 0)
            self._socket = None

    def close(self) -> None:
        """Free everything."""
        self.finished = True
        self.disconnect()
        self._listener.close()
        self._context.term()
