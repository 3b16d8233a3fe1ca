"""The leader's shell: one socket, one engine and one loop around the pure core. Decides nothing itself.

    wait      for the broker, the launcher or a signal; not at all while there is work
    receive   everything that waits
    compute   the calls that follow, then one step, on every rank
    send      what came of it

The thread that runs the loop owns the socket. While it computes, and only then, it lends socket and core to a second
thread, which sends the heartbeats of a long step.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from headrace.card import ModelCard
from headrace.codec import MAX_BODY, decode, encode
from headrace.errors import AddressError, ProtocolError
from headrace.messages import BROKER_TO_LEADER, Message
from headrace.processes import Parent
from headrace.workers import plan
from headrace.workers.leader import Leader
from headrace.workers.leader_events import (
    Beat,
    Blocked,
    Call,
    Connect,
    Disconnect,
    Drain,
    End,
    Event,
    Flowing,
    LinkLost,
    Note,
    Received,
    Refusals,
    Send,
    Stepped,
    Tell,
    Tick,
)

__all__ = ["LeaderLoop", "ServedEngine"]

logger = logging.getLogger(__name__)

_RECEIVE = 256  # messages per turn
_FAREWELL_MS = 1000  # for the last words of a group that ends before it was welcomed
_TERM_GRACE = 30.0  # seconds to drain after a SIGTERM
_PULSE = 0.1  # how often the second thread looks whether a heartbeat is due

_OPTIONS = {
    zmq.LINGER: 0,
    zmq.SNDHWM: 1024,  # steps whose tokens may wait for a broker that is busy
    zmq.MAXMSGSIZE: MAX_BODY,
    zmq.HANDSHAKE_IVL: 3000,
    zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 1000,
    # A half-open connection ends; a broker that was stopped for less goes on as if nothing had been.
    zmq.HEARTBEAT_IVL: 5000,
    zmq.HEARTBEAT_TIMEOUT: 30000,
}


class ServedEngine(plan.Engine, Protocol):
    """What a leader needs of an engine."""

    card: ModelCard
    blobs: dict[str, bytes]
    max_num_seqs: int
    kv_tokens: int

    @property
    def steps(self) -> int:
        """Steps computed since the start."""

    def load_gauges(self) -> dict[str, int | float]:
        """Figures for heartbeats."""


class LeaderLoop:
    """Serves a broker with an engine until the group is drained.

    Args:
        engine: warm.
        endpoint: of the broker's face for workers.
        group: the group's name.
        launcher: hears of readiness and progress, and says when to drain.
        writer: to the followers.
        awake: seconds after work ended during which it goes on looking for messages without sleeping. A core that slept
            is slow to wake, and has forgotten the engine: half a millisecond of a first token, for a core's time.
    """

    def __init__(
        self,
        engine: ServedEngine,
        endpoint: str,
        group: str,
        *,
        launcher: Parent | None = None,
        writer: plan.PlanWriter | None = None,
        awake: float = 0.0,
    ) -> None:
        self._engine = engine
        self._endpoint = endpoint
        self._launcher = launcher
        self._writer = writer or plan.PlanWriter()
        self._core = Leader(
            group=group,
            card=engine.card,
            max_num_seqs=engine.max_num_seqs,
            kv_tokens=engine.kv_tokens,
            blobs={hashlib.sha256(data).hexdigest(): data for data in engine.blobs.values()},
            life=secrets.token_hex(8),
        )
        self._awake = awake
        self._sleep_at = 0.0  # when to sleep at the earliest
        self._calls: list[plan.Call] = []
        self._outbox: deque[list[bytes]] = deque()  # waits for room in the socket
        self._ended: End | None = None
        self._terms = 0
        self._lent = threading.Lock()  # held by the loop, except while it computes
        self._over = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)

    def run(self) -> None:
        """Serve until drained.

        Raises:
            HeadraceError: the broker will never take this group, or the endpoint is no address.
            Exception: the engine failed; the broker was told nothing and replays what ran here.
        """
        self._poller.register(self._wake_in, zmq.POLLIN)
        if self._launcher is not None:
            self._poller.register(self._launcher.fileno(), zmq.POLLIN)
        pulse = threading.Thread(target=self._pulse, name="pulse", daemon=True)
        self._lent.acquire()
        try:
            pulse.start()
            while self._ended is None:
                self._turn()
            self._writer.stop()
            self._disconnect(_FAREWELL_MS)
        finally:
            self._over.set()
            self._lent.release()
            pulse.join()
            self._disconnect(0)
            self._context.term()
            os.close(self._wake_in)
            os.close(self._wake_out)
        if self._ended.error is not None:
            raise self._ended.error

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first asks to drain, the second ends the process."""
        self._terms += 1
        if self._terms > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(OSError):
            os.write(self._wake_out, b"x")

    # ----------------------------------------------------------------------------------------------------- one turn

    def _turn(self) -> None:
        self._wait()
        now = time.monotonic()
        for event in self._events():
            self._handle(event, now)
        load = self._engine.load_gauges() if self._core.needs_load(now) else None
        self._handle(Tick(load), now)
        if self._core.may_step and (self._calls or self._engine.has_work):
            self._compute()

    def _wait(self) -> None:
        timeout = 0.0
        if not (self._core.may_step and (self._calls or self._engine.has_work)):
            wake_at = self._core.wake_at()
            while (now := time.monotonic()) < min(wake_at, self._sleep_at):
                if ready := self._poller.poll(0):
                    self._ready = dict(ready)
                    return
            timeout = max(0.0, wake_at - now)
        self._ready = dict(self._poller.poll(int(timeout * 1000) + (timeout > 0)))

    def _events(self) -> Iterator[Event]:
        """What the wait brought."""
        if self._wake_in in self._ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_in, 64)
            yield Drain(_TERM_GRACE)
        if self._launcher is not None and self._launcher.fileno() in self._ready:
            yield from self._from_launcher()
        if self._outbox:
            yield from self._flush()
        yield from self._from_broker()
        if self._monitor is not None and self._monitor in self._ready:
            with contextlib.suppress(zmq.Again):
                recv_monitor_message(self._monitor, zmq.NOBLOCK)
                yield LinkLost()

    def _from_launcher(self) -> Iterator[Event]:
        assert self._launcher is not None
        message = self._launcher.receive(0)
        if message is not None and message["kind"] == "drain":
            yield Drain(float(message["grace"]))

    def _from_broker(self) -> Iterator[Event]:
        for _ in range(_RECEIVE):
            socket = self._socket  # what was received may have led to a new one
            if socket is None or socket not in self._ready:
                return
            try:
                message = decode(socket.recv_multipart(zmq.NOBLOCK), BROKER_TO_LEADER)
            except zmq.Again:
                return
            except ProtocolError as error:
                logger.error("a message of the broker was dropped: %s", error.message)
                continue
            yield Received(message)

    def _compute(self) -> None:
        """Carry out the calls and a step, on all ranks."""
        calls, self._calls = self._calls, []
        now = time.monotonic()
        self._lent.release()
        try:
            self._writer.send(calls, now)
            refusals, results = plan.carry_out(self._engine, calls, now)
            self._writer.note(refusals, results)
        finally:
            self._lent.acquire()
        now = time.monotonic()
        self._sleep_at = now + self._awake
        if refusals:
            self._handle(Refusals(refusals), now)
        if results is not None:
            self._handle(Stepped(results, self._engine.steps), now)

    # ------------------------------------------------------------------------------------------------------ actions

    def _handle(self, event: Event, now: float) -> None:
        for action in self._core.handle(event, now):
            match action:
                case Send():
                    self._send(action.message, now)
                case Call():
                    self._calls.append(action.call)
                case Connect():
                    self._connect()
                case Disconnect():
                    self._disconnect(0)
                case Tell():
                    if self._launcher is not None:
                        self._launcher.send(action.kind, **action.fields)
                case Note():
                    logger.log(action.level, "%s", action.text)
                case End():
                    self._ended = action

    def _send(self, message: Message, now: float) -> None:
        frames = encode(message)
        if self._socket is None:
            return
        if not self._outbox:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
                return
            except zmq.Again:
                self._poller.modify(self._socket, zmq.POLLIN | zmq.POLLOUT)
                self._handle(Blocked(), now)
        self._outbox.append(frames)

    def _flush(self) -> Iterator[Event]:
        """Send what waits, as far as there is room."""
        assert self._socket is not None
        with contextlib.suppress(zmq.Again):
            while self._outbox:
                self._socket.send_multipart(self._outbox[0], zmq.NOBLOCK)
                self._outbox.popleft()
            self._poller.modify(self._socket, zmq.POLLIN)
            yield Flowing()

    def _connect(self) -> None:
        self._disconnect(0)
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        for option, value in _OPTIONS.items():
            socket.setsockopt(option, value)
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise AddressError(
                f"{self._endpoint!r} is not an endpoint to connect to ({error}); "
                "write ipc:///path/to.sock or tcp://127.0.0.1:PORT."
            ) from error
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def _disconnect(self, linger_ms: int) -> None:
        """Close the socket; what was not sent in time is lost, and must not come up on the next."""
        if self._socket is None or self._monitor is None:
            return
        for each in (self._socket, self._monitor):
            if each in self._poller:
                self._poller.unregister(each)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._socket = self._monitor = None
        self._outbox.clear()

    # ---------------------------------------------------------------------------------------------- the second thread

    def _pulse(self) -> None:
        """Send heartbeats while the loop computes. A loop that hangs is seen all the same: the step stands still."""
        while not self._over.wait(_PULSE):
            if self._lent.acquire(blocking=False):
                try:
                    self._handle(Beat(), time.monotonic())
                except Exception:
                    logger.exception("a heartbeat could not be sent")
                finally:
                    self._lent.release()
