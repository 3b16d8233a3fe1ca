"""The leader's side of the wire, pure: events in, actions out, time as an argument; no socket, clock or thread.

Laws
 1. What the broker hears of a stream was computed under the attempt that it gave last, on this connection. After a
    connection ended nothing of it is said on the next one: all streams are dropped, and the broker assigns again what
    it wants. Their KV stays in the prefix cache, and the hello names them, so that they come back to it.
 2. A connection that broke, fell silent or was reset is never mended: there is a new socket and a new hello.
 3. A heartbeat says how many steps were made. It goes out during a long step too, but no step that was not made does.
 4. A group that drains takes nothing on, finishes what it can in time, says Drained last, and stays until it was heard:
    a broker that does not know a group any more answers what it says with Reset.

    link      event                                  next
    paused    time is up                             greeting   Connect, GroupHello
    greeting  GroupWelcome                           ready      Heartbeat
    greeting  Error                                  ended      the broker will never take this group
    greeting  5 s without a word                     paused     Disconnect
    ready     Reset                                  paused     RevokeAll, Disconnect
    ready     30 s without taking a message          paused     RevokeAll, Disconnect
    any       LinkLost                               paused     RevokeAll, Disconnect
    ready     drained, or the time for it is over    leaving    RevokeAll, Drained, Heartbeat
    leaving   Reset, LinkLost, 4 s without either    ended
    greeting  Drain                                  ended      Drained, in case the hello arrived
    paused    Drain                                  ended
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from math import inf
from typing import Any

from headrace.card import ModelCard
from headrace.codec import BLOB_CHUNK
from headrace.errors import HeadraceError, UnavailableError, from_wire
from headrace.messages import (
    Assign,
    Assignment,
    Blob,
    Done,
    Drained,
    Error,
    GetBlob,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Message,
    Refusal,
    Refused,
    Reset,
    Revoke,
    StreamId,
    Tokens,
)
from headrace.messages import Drain as DrainMessage
from headrace.workers.leader_events import (
    Action,
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
from headrace.workers.plan import RevokeAll

__all__ = ["Leader", "Link"]

GREETING_TIMEOUT = 5.0
BLOCKED_TIMEOUT = 30.0  # a broker that was stopped for less goes on as if nothing had been
FAREWELL_TIMEOUT = 4.0
BACKOFF = (0.1, 5.0)
GOOD_SERVICE = 10.0  # a connection that lasted this long is followed by a new one at once
BEAT_RANGE = (0.05, 10.0)
RUNS_PER_MESSAGE = 1024  # one message per step, unless the limits of the codec come near
MAX_HINTS = 4096


class Link(Enum):
    """What there is between this group and the broker."""

    PAUSED = "paused"
    GREETING = "greeting"
    READY = "ready"
    LEAVING = "leaving"
    ENDED = "ended"


class Leader:
    """All that a leader knows: its connection, and the streams that the broker gave it.

    Args:
        group: its name in the pool.
        card: of the model.
        max_num_seqs: streams that run at once.
        kv_tokens: tokens the KV cache holds.
        blobs: files of the card, by the hash of their content.
        life: names this run of the process, so that the broker can tell a lost connection from a crash.
    """

    def __init__(
        self,
        *,
        group: str,
        card: ModelCard,
        max_num_seqs: int,
        kv_tokens: int,
        blobs: Mapping[str, bytes],
        life: str = "",
    ) -> None:
        self.link = Link.PAUSED
        self._hello = {
            "group": group,
            "card": card,
            "max_num_seqs": max_num_seqs,
            "kv_tokens": kv_tokens,
            "life": life,
        }
        self._blobs = blobs
        self._streams: dict[tuple[bytes, int], int] = {}  # (request, choice) -> attempt
        self._hints: tuple[StreamId, ...] = ()  # what it ran when the last connection ended
        self._step = 0
        self._load: dict[str, Any] = {}
        self._beat_every = 1.0
        self._beat_at = -inf
        self._retry_at = -inf
        self._since = -inf  # when the link became what it is
        self._tries = 0
        self._blocked_at: float | None = None
        self._drain_until: float | None = None
        self._out: list[Action] = []
        self._on_message: dict[type, Callable[[Any, float], None]] = {
            GroupWelcome: self._on_welcome,
            Assign: self._on_assign,
            Revoke: self._on_revoke,
            GetBlob: self._on_get_blob,
            DrainMessage: lambda message, now: self._drain(message.grace_ms / 1000, now),
            Reset: self._on_reset,
            Error: self._on_error,
        }

    # ------------------------------------------------------------------------------------------------ in and out

    def handle(self, event: Event, now: float) -> list[Action]:
        """Everything that follows from an event, in order."""
        self._out = []
        if self.link is not Link.ENDED:
            match event:
                case Received():
                    self._receive(event.message, now)
                case Stepped():
                    self._on_step(event, now)
                case Refusals():
                    self._refuse(event.refusals)
                case Tick():
                    self._tick(event, now)
                case Beat():
                    self._beat(now)
                case LinkLost():
                    self._lose("The connection to the broker broke.", now)
                case Blocked():
                    self._blocked_at = now
                case Flowing():
                    self._blocked_at = None
                case Drain():
                    self._drain(event.grace, now)
        return self._out

    def _receive(self, message: Message, now: float) -> None:
        # One that leaves has said all; one without a connection can have received nothing of importance.
        if self.link in (Link.GREETING, Link.READY) or isinstance(message, Reset):
            self._on_message[type(message)](message, now)

    @property
    def may_step(self) -> bool:
        """Whether results of a step can be sent."""
        return self._blocked_at is None

    def needs_load(self, now: float) -> bool:
        """Whether the next Tick should bring the engine's gauges."""
        return now >= self._beat_at

    def wake_at(self) -> float:
        """When to send a Tick at the latest."""
        times = [self._beat_at]
        if self.link is Link.PAUSED:
            times.append(self._retry_at)
        elif self.link is Link.GREETING:
            times.append(self._since + GREETING_TIMEOUT)
        elif self.link is Link.LEAVING:
            times.append(self._since + FAREWELL_TIMEOUT)
        if self._blocked_at is not None:
            times.append(self._blocked_at + BLOCKED_TIMEOUT)
        if self._drain_until is not None:
            times.append(self._drain_until)
        return min(times)

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert self.link is Link.READY or not self._streams
        assert self.link in (Link.READY, Link.LEAVING, Link.ENDED) or self._blocked_at is None
        assert self.link is Link.READY or self._drain_until is None

    # ---------------------------------------------------------------------------------------------- the connection

    def _tick(self, event: Tick, now: float) -> None:
        if event.load is not None:
            self._load = event.load
        if self.link is Link.PAUSED and now >= self._retry_at:
            self._greet(now)
        elif self.link is Link.GREETING and now >= self._since + GREETING_TIMEOUT:
            self._out.append(Tell("waiting", {}))
            self._lose("No broker answers; trying again until one does.", now)
        elif self.link is Link.LEAVING and now >= self._since + FAREWELL_TIMEOUT:
            self._end()
        elif self._blocked_at is not None and now >= self._blocked_at + BLOCKED_TIMEOUT:
            self._lose("The broker takes no messages.", now)
        self._beat(now)
        self._conclude(now)

    def _greet(self, now: float) -> None:
        self._become(Link.GREETING, now)
        self._out += [Connect(), Send(GroupHello(**self._hello, running=self._hints))]  # type: ignore[arg-type]

    def _lose(self, why: str, now: float) -> None:
        """Give the connection up with all that came over it."""
        if self.link is Link.LEAVING or self._drain_until is not None:
            self._drop_all()
            self._end()
        if self.link not in (Link.GREETING, Link.READY):
            return
        level = logging.WARNING if self.link is Link.READY or self._tries == 0 else logging.DEBUG
        self._out.append(Note(level, why))
        if self._streams:
            self._hints = self._names()[:MAX_HINTS]
        self._drop_all()
        self._out.append(Disconnect())
        self._blocked_at = None
        if self.link is Link.READY and now - self._since >= GOOD_SERVICE:
            self._tries = 0
        first, longest = BACKOFF
        self._retry_at = now + (0.0 if self._tries == 0 else min(longest, first * 2 ** (self._tries - 1)))
        self._tries = min(self._tries + 1, 16)
        self._become(Link.PAUSED, now)

    def _become(self, link: Link, now: float) -> None:
        self.link = link
        self._since = now

    def _end(self, error: HeadraceError | None = None) -> None:
        self._drain_until = None
        self.link = Link.ENDED
        self._out.append(End(error))

    def _on_welcome(self, message: GroupWelcome, now: float) -> None:
        if self.link is not Link.GREETING:
            return
        self._hints = ()
        self._become(Link.READY, now)
        low, high = BEAT_RANGE
        self._beat_every = min(high, max(low, message.heartbeat_ms / 1000))
        self._out += [Note(logging.INFO, f"The broker {message.broker} took the group."), Tell("ready", {})]
        self._beat_at = now
        self._beat(now)

    def _on_reset(self, message: Reset, now: float) -> None:
        self._lose(f"The broker reset the group: {message.reason[:200]}", now)

    def _on_error(self, message: Error, now: float) -> None:
        error = from_wire(message.error)
        if self.link is Link.READY:
            self._out.append(Note(logging.ERROR, f"The broker complains: {error.message[:1000]}"))
            return
        self._end(error)

    # ---------------------------------------------------------------------------------------------------- heartbeats

    def _beat(self, now: float) -> None:
        if now < self._beat_at:
            return
        self._beat_at = now + self._beat_every
        busy = bool(self._streams)
        self._out.append(Tell("beat", {"step": self._step, "busy": busy}))
        if self.link is Link.READY:
            load = self._load | ({} if self._drain_until is None else {"draining": 1})
            self._send(Heartbeat(step=self._step, busy=busy, load=load))

    # ------------------------------------------------------------------------------------------------------- streams

    def _on_assign(self, message: Assign, now: float) -> None:
        if self.link is not Link.READY:
            return
        if self._drain_until is not None:
            error = UnavailableError("The group is about to end.").to_wire()
            self._send(Refused(refusals=tuple(Refusal(*_name(a), error) for a in message.assignments)))
            return
        for assignment in message.assignments:
            key = (assignment.request, assignment.choice)
            self._streams[key] = max(assignment.attempt, self._streams.get(key, assignment.attempt))
        self._out.append(Call(message))

    def _on_revoke(self, message: Revoke, now: float) -> None:
        for request, choice, attempt in message.streams:
            if self._streams.get((request, choice), attempt + 1) <= attempt:
                del self._streams[request, choice]
        self._out.append(Call(message))
        self._conclude(now)

    def _on_step(self, event: Stepped, now: float) -> None:
        self._step = event.step
        if self.link is not Link.READY:
            return
        results = event.results
        runs = [run for run in results.runs if self._runs(run)]
        for first in range(0, len(runs), RUNS_PER_MESSAGE):
            self._send(Tokens(runs=tuple(runs[first : first + RUNS_PER_MESSAGE]), step=event.step))
        finishes = tuple(finish for finish in results.finishes if self._runs(finish))
        if finishes:
            self._forget(finishes)
            self._send(Done(finishes=finishes))
        self._refuse(results.refusals)
        self._conclude(now)

    def _refuse(self, refusals: Iterable[Refusal]) -> None:
        present = tuple(refusal for refusal in refusals if self._runs(refusal))
        if present:
            self._forget(present)
            self._send(Refused(refusals=present))

    def _runs(self, named: tuple[Any, ...]) -> bool:
        """Whether this names a stream by the attempt that the broker gave last."""
        return bool(self._streams.get(named[:2]) == named[2])

    def _forget(self, named: Iterable[tuple[Any, ...]]) -> None:
        for entry in named:
            self._streams.pop(entry[:2], None)

    def _drop_all(self) -> None:
        if self._streams:
            self._streams.clear()
            self._out.append(Call(RevokeAll()))

    def _names(self) -> tuple[StreamId, ...]:
        return tuple(StreamId(*key, attempt) for key, attempt in self._streams.items())

    # ------------------------------------------------------------------------------------------------ blobs, draining

    def _on_get_blob(self, message: GetBlob, now: float) -> None:
        data = self._blobs.get(message.hash)
        if data is None or not 0 <= message.offset <= len(data):
            self._out.append(
                Note(logging.ERROR, f"The broker asked for blob {message.hash[:64]!r}, which is not here.")
            )
            return
        part = data[message.offset : message.offset + BLOB_CHUNK]
        self._send(Blob(hash=message.hash, offset=message.offset, total=len(data), data=part))

    def _drain(self, grace: float, now: float) -> None:
        if self.link is Link.LEAVING:
            return
        if self.link is not Link.READY:
            if self.link is Link.GREETING:
                self._send(Drained())  # the hello may have arrived
            self._end()
            return
        until = now + max(0.0, grace)
        self._drain_until = until if self._drain_until is None else min(until, self._drain_until)
        self._beat_at = now
        self._beat(now)  # so that nothing new is placed here
        self._conclude(now)

    def _conclude(self, now: float) -> None:
        """Leave once everything is finished, or the time to do so is over."""
        if self._drain_until is None or (self._streams and now < self._drain_until):
            return
        self._drain_until = None
        self._drop_all()
        self._send(Drained())
        self._send(Heartbeat(step=self._step, busy=False))  # a question: am I forgotten?
        self._become(Link.LEAVING, now)

    def _send(self, message: Message) -> None:
        self._out.append(Send(message))


def _name(assignment: Assignment) -> StreamId:
    return StreamId(assignment.request, assignment.choice, assignment.attempt)
