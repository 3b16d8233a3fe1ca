"""The client's side of the wire, pure: events in, actions out, time as an argument; no socket, clock or thread.

Laws
 1. A token index is delivered once and in order: lower ones are dropped, a gap is asked for again and nothing after it
    is delivered meanwhile. Runs of attempts older than the newest one seen are dropped.
 2. Every request ends exactly once: with the ends of all its choices, or with one error.
 3. Before its first token a request may be tried again, after it only resumed; a token that was delivered stays.
 4. Nothing but Hello is said before Welcome. A connection that fell silent, or whose broker does not know it, is never
    mended: it is dropped, and after a while there is a new one.

    link      event                        next
    idle      work                         greeting     Connect, Hello
    greeting  Welcome                      ready        Submit new requests, Attach accepted ones, ask again
    greeting  4 s without a word           backoff      Disconnect
    ready     4 s silent, or "not known"   backoff      Disconnect
    backoff   time is up                   greeting     Connect, Hello
    greeting, backoff   no work is left    idle         Disconnect
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from math import inf
from random import Random
from typing import Any

from headrace.client.events import (
    Action,
    Answer,
    Ask,
    Close,
    Connect,
    Disconnect,
    Drop,
    Emit,
    Ended,
    Event,
    Failed,
    LinkFailed,
    NewTokens,
    Received,
    Send,
    Start,
    Tick,
)
from headrace.client.flights import Flight
from headrace.client.types import Timeouts
from headrace.errors import (
    BrokerConnectionError,
    DeadlineExceededError,
    HeadraceError,
    ProtocolError,
    RequestCancelledError,
    RequestTimeoutError,
    UnknownRequestError,
    UnsupportedVersionError,
    from_wire,
)
from headrace.messages import (
    Accepted,
    Ack,
    Attach,
    Blob,
    Cancel,
    Cards,
    Credit,
    Describe,
    Done,
    Error,
    GetBlob,
    GetStatus,
    Hello,
    Message,
    Ping,
    Pong,
    Status,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
    unpack_tokens,
)

__all__ = ["Link", "Session"]

PING_EVERY = 1.0
SILENCE = 4.0  # a broker that says nothing for this long, though asked, is gone
ACK_TOKENS = 64
ACK_EVERY = 0.25
SCAN_EVERY = 0.1  # how late a timeout may be
ASK_AGAIN = 1.0  # between two questions for the same gap
RESEND_AFTER = 5.0  # a submit that was not accepted by then is sent again; ids make that harmless
PROBE_AFTER = 10.0  # a stream that stood still for this long asks whether it missed something
ANSWER_WITHIN = 30.0
BACKOFF = (0.1, 5.0)
SUBMIT_BYTES = 4 << 20
SUBMIT_COUNT = 256
ATTACH_COUNT = 1024
RESUBMITS = 5  # of a request that the broker says it does not know, without a token in between
FAULTS = 3  # protocol errors in a row, with nothing good between, after which trying again is no use


class Link(Enum):
    """What there is between this client and the broker."""

    IDLE = "idle"
    GREETING = "greeting"
    READY = "ready"
    BACKOFF = "backoff"
    CLOSED = "closed"


class Session:
    """All requests of one client and its connection to the broker.

    Args:
        endpoint: of the broker, for messages to people.
        timeouts: of requests and of the connection.
        retries: how often a request is tried again after an error that may pass.
        random: draws ids, seeds and waiting times.
    """

    def __init__(self, endpoint: str, *, timeouts: Timeouts, retries: int, random: Random, name: str = "") -> None:
        self._endpoint = endpoint
        self._timeouts = timeouts
        self._retries = retries
        self._random = random
        self._name = name
        self.link = Link.IDLE
        self._flights: dict[int, Flight] = {}  # by ticket
        self._by_id: dict[bytes, Flight] = {}
        self._asks: dict[int, tuple[Message, float]] = {}  # by ticket: question and when it was asked
        self._cancels: dict[bytes, None] = {}  # to be said once there is a connection
        self._dirty: dict[tuple[bytes, int], Ack] = {}  # acknowledgements not yet said
        self._ack_at: float | None = None
        self._link_since = 0.0
        self._down_since = 0.0
        self._heard = 0.0
        self._pinged = -inf
        self._nonce = 0
        self._tries = 0
        self._faults = 0
        self._scan_at = 0.0
        self._out: list[Action] = []

    # ------------------------------------------------------------------------------------------------ in and out

    def handle(self, event: Event, now: float) -> list[Action]:
        """Everything that follows from an event, in order."""
        self._out = []
        if self.link is not Link.CLOSED:
            match event:
                case Received():
                    self._received(event.message, now)
                case Tick():
                    self._tick(now)
                case Start():
                    self._start(event, now)
                case Drop():
                    self._drop(event.ticket, now)
                case Ask():
                    self._ask(event, now)
                case LinkFailed():
                    self._link_failed(event.error, now)
                case Close():
                    self._close()
        return self._out

    def wake_at(self) -> float | None:
        """When to send a Tick at the latest; None if there is nothing to wait for."""
        if not self._has_work():
            return self._ack_at
        return self._scan_at if self._ack_at is None else min(self._scan_at, self._ack_at)

    def validate(self) -> None:
        """Assert what must hold between events."""
        assert len(self._by_id) == len(self._flights)
        for ticket, flight in self._flights.items():
            assert flight.ticket == ticket
            assert self._by_id[flight.id] is flight
            assert not all(choice.ended for choice in flight.choices)
        assert self.link is Link.READY or self._has_work() == (self.link in (Link.GREETING, Link.BACKOFF))
        assert (self._ack_at is not None) == bool(self._dirty)

    def _send(self, message: Message) -> None:
        assert self.link in (Link.READY, Link.GREETING)
        self._out.append(Send(message))

    def _has_work(self) -> bool:
        return bool(self._flights or self._asks)

    # ----------------------------------------------------------------------------------------------- the caller's wishes

    def _start(self, event: Start, now: float) -> None:
        flights = [Flight(ticket, spec, self._random, now) for ticket, spec in event.requests]
        self._work_begins(now)
        for flight in flights:
            self._flights[flight.ticket] = self._by_id[flight.id] = flight
        if self.link is Link.READY:
            self._submit(flights, now)

    def _ask(self, event: Ask, now: float) -> None:
        self._work_begins(now)
        waiting = any(message == event.question for message, _ in self._asks.values())
        self._asks[event.ticket] = (event.question, now)
        if self.link is Link.READY and not waiting:
            self._send(event.question)

    def _drop(self, ticket: int, now: float) -> None:
        self._asks.pop(ticket, None)
        if (flight := self._flights.get(ticket)) is not None:
            self._forget(flight)
            self._cancel(flight)
        self._rest_if_done()

    def _close(self) -> None:
        if self.link is Link.READY:
            self._cancels.update(dict.fromkeys(flight.id for flight in self._flights.values() if flight.sent_at))
            self._say_cancels()
        for ticket in [*self._flights, *self._asks]:
            self._fail(ticket, RequestCancelledError("The client was closed before the answer was complete."))
        self._disconnect(Link.CLOSED)

    # -------------------------------------------------------------------------------------------------- the connection

    def _work_begins(self, now: float) -> None:
        """An idle connection is not pinged, so its silence counts from here only."""
        if not self._has_work():
            self._heard, self._pinged, self._scan_at = now, -inf, now + SCAN_EVERY
        if self.link is Link.IDLE:
            self._down_since = now
            self._tries = 0
            self._connect(now)

    def _connect(self, now: float) -> None:
        self.link, self._link_since = Link.GREETING, now
        self._tries += 1
        self._out.append(Connect())
        self._send(Hello(name=self._name))

    def _disconnect(self, link: Link) -> None:
        self.link = link
        self._dirty.clear()  # positions are told again by Attach
        self._ack_at = None
        self._out.append(Disconnect())

    def _lost(self, now: float, since: float) -> None:
        """Drop the connection and wait, longer each time, by a random part, so that a crowd does not come back at once."""
        if self.link is Link.READY:
            self._down_since = since
        low, high = BACKOFF
        wait = min(high, low * 2.0 ** min(self._tries, 10)) * self._random.uniform(0.5, 1.0)
        self._disconnect(Link.BACKOFF)
        self._link_since = now + max(low, wait)
        self._rest_if_done()

    def _link_failed(self, error: HeadraceError, now: float) -> None:
        """There is no way to that endpoint: waiting would not help."""
        for ticket in [*self._flights, *self._asks]:
            self._fail(ticket, error)
        self._disconnect(Link.IDLE)

    def _rest_if_done(self) -> None:
        """Without work an unanswered greeting is not worth waiting for, and silence is no fault."""
        if not self._has_work() and self.link in (Link.GREETING, Link.BACKOFF):
            self._disconnect(Link.IDLE)

    def _welcomed(self, now: float) -> None:
        self.link, self._link_since = Link.READY, now
        self._tries = 0
        self._pinged = now
        self._say_cancels()
        self._submit([flight for flight in self._flights.values() if flight.fresh], now)
        self._attach([flight for flight in self._flights.values() if flight.accepted], now)
        for question in dict.fromkeys(question for question, _ in self._asks.values()):
            self._send(question)

    # ------------------------------------------------------------------------------------------- what is said to the broker

    def _submit(self, flights: Iterable[Flight], now: float) -> None:
        batch, size = [], 0
        for flight in flights:
            request = flight.submission(now)
            weight = len(request.prompt) + sum(map(len, request.output))
            if batch and (size + weight > SUBMIT_BYTES or len(batch) == SUBMIT_COUNT):
                self._send(Submit(requests=tuple(batch)))
                batch, size = [], 0
            batch.append(request)
            size += weight
        if batch:
            self._send(Submit(requests=tuple(batch)))

    def _attach(self, flights: list[Flight], now: float) -> None:
        positions = [ack for flight in flights for ack in flight.positions(now)]
        for start in range(0, len(positions), ATTACH_COUNT):
            self._send(Attach(positions=tuple(positions[start : start + ATTACH_COUNT])))

    def _cancel(self, flight: Flight) -> None:
        if flight.sent_at is not None:
            self._cancels[flight.id] = None
            self._say_cancels()

    def _say_cancels(self) -> None:
        if self._cancels and self.link is Link.READY:
            self._send(Cancel(requests=tuple(self._cancels)))
            self._cancels.clear()

    def _acknowledge(self, ack: Ack, now: float, *, soon: bool) -> None:
        self._dirty[ack.request, ack.choice] = ack
        if soon:
            self._say_acks()
        elif self._ack_at is None:
            self._ack_at = now + ACK_EVERY

    def _say_acks(self) -> None:
        if self._dirty:
            self._send(Credit(acks=tuple(self._dirty.values())))
        for id, number in self._dirty:
            if (flight := self._by_id.get(id)) is not None:
                flight.choices[number].acked = len(flight.choices[number].output)
        self._dirty.clear()
        self._ack_at = None

    # ------------------------------------------------------------------------------------------- what the broker says

    def _received(self, message: Any, now: float) -> None:
        greeting = self.link is Link.GREETING and isinstance(message, Welcome | Error)
        if not greeting and self.link is not Link.READY:
            return  # the last words of a connection that was given up
        self._heard = now
        match message:
            case Tokens():
                for run in message.runs:
                    self._run(run, now)
            case Done():
                self._done(message, now)
            case Accepted():
                self._accepted(message, now)
            case Error():
                self._error(message, now)
            case Welcome():
                if self.link is Link.GREETING:
                    self._welcomed(now)
            case Cards():
                self._answer(Describe(), message.cards)
            case Status():
                self._answer(GetStatus(), message.report)
            case Blob():
                self._answer(GetBlob(hash=message.hash, offset=message.offset), message)
            case Pong():
                pass

    def _answer(self, question: Message, value: Any) -> None:
        self._faults = 0
        for ticket in [ticket for ticket, (asked, _) in self._asks.items() if asked == question]:
            del self._asks[ticket]
            self._out.append(Emit(ticket, Answer(value), True))

    def _accepted(self, message: Accepted, now: float) -> None:
        self._faults = 0
        for acceptance in message.requests:
            if (flight := self._by_id.get(acceptance.request)) is not None:
                flight.accepted = True
                flight.news_at = now

    def _run(self, run: TokenRun, now: float) -> None:
        flight = self._by_id.get(run.request)
        if flight is None or not 0 <= run.choice < len(flight.choices):
            return
        choice = flight.choices[run.choice]
        if choice.ended or run.attempt < choice.attempt or len(run.tokens) % 4:
            return
        choice.attempt = run.attempt
        flight.accepted = True
        known = len(choice.output) - run.first
        if known < 0:
            self._gap(flight, now)
            return
        tokens = unpack_tokens(run.tokens)[known:]
        if not tokens:
            return
        choice.output.extend(tokens)
        flight.progress(now)
        logprobs = None if run.logprobs is None else run.logprobs[known:]
        self._out.append(Emit(flight.ticket, NewTokens(flight.id, run.choice, tokens, logprobs), False))
        ack = Ack(flight.id, run.choice, len(choice.output), False)
        self._acknowledge(ack, now, soon=len(choice.output) - choice.acked >= ACK_TOKENS)

    def _gap(self, flight: Flight, now: float) -> None:
        if now >= flight.ask_again_at:
            flight.ask_again_at = now + ASK_AGAIN
            self._attach([flight], now)

    def _done(self, message: Done, now: float) -> None:
        for finish in message.finishes:
            flight = self._by_id.get(finish.request)
            if flight is None:
                # Its last acknowledgement was lost, or it was cancelled; either way the broker may forget it.
                self._acknowledge(Ack(finish.request, finish.choice, finish.total, True), now, soon=False)
                continue
            flight.accepted = True
            if not 0 <= finish.choice < len(flight.choices):
                continue
            choice = flight.choices[finish.choice]
            if choice.ended or finish.attempt < choice.attempt:
                continue
            if finish.total > len(choice.output):
                self._gap(flight, now)
                continue
            choice.ended = True
            flight.progress(now)
            over = all(choice.ended for choice in flight.choices)
            ended = Ended(flight.id, finish.choice, finish.reason, finish.cached)
            self._out.append(Emit(flight.ticket, ended, over))
            self._acknowledge(Ack(flight.id, finish.choice, len(choice.output), True), now, soon=False)
            if over:
                self._forget(flight, keep_acks=True)
        self._say_acks()

    def _error(self, message: Error, now: float) -> None:
        error = from_wire(message.error)
        if message.request:
            if (flight := self._by_id.get(message.request)) is not None:
                self._flight_error(flight, error, now)
                self._rest_if_done()
        elif isinstance(error, UnsupportedVersionError):
            self._link_failed(error, now)
        elif isinstance(error, ProtocolError):
            # Above all "say Hello first": the broker is not the one we greeted. It takes a new connection.
            self._faults += 1
            if self._faults > FAULTS:
                self._faults = 0
                self._link_failed(error, now)
            else:
                self._lost(now, now)
        else:
            # Only questions are answered without a request's id; it does not say which, so it is blobs first.
            blobs = [ticket for ticket, (asked, _) in self._asks.items() if isinstance(asked, GetBlob)]
            for ticket in blobs if error.param in ("hash", "offset") else list(self._asks):
                self._fail(ticket, error)

    def _flight_error(self, flight: Flight, error: HeadraceError, now: float) -> None:
        if isinstance(error, UnknownRequestError) and flight.unknown < RESUBMITS:
            flight.unknown += 1
            flight.accepted = False
            self._submit([flight], now)
            return
        if error.retryable and flight.tries < self._retries:
            flight.tries += 1
            wait = max(error.retry_after or 0.0, 0.25 * 2.0**flight.tries * self._random.uniform(0.75, 1.0))
            if flight.deadline is None or now + wait < flight.deadline:
                # The broker may remember the old id together with this error, so it takes a new one.
                del self._by_id[flight.id]
                self._discard_acks(flight)
                flight.wait_until(now + wait, self._random)
                self._by_id[flight.id] = flight
                return
        self._fail(flight.ticket, error)

    # ------------------------------------------------------------------------------------------------------ time

    def _tick(self, now: float) -> None:
        if self._ack_at is not None and now >= self._ack_at:
            self._say_acks()
        if not self._has_work() or now < self._scan_at:
            return
        self._scan_at = now + SCAN_EVERY
        for flight in list(self._flights.values()):
            if (error := self._overdue(flight, now)) is not None:
                self._cancel(flight)
                self._fail(flight.ticket, error)
        for ticket, (_, asked_at) in list(self._asks.items()):
            if (error := self._unanswered(asked_at, now)) is not None:
                self._fail(ticket, error)
        self._rest_if_done()
        self._tick_link(now)
        if self.link is Link.READY:
            self._tick_flights(now)

    def _tick_link(self, now: float) -> None:
        match self.link:
            case Link.BACKOFF if now >= self._link_since:
                self._connect(now)
            case Link.GREETING if now - self._link_since >= SILENCE:
                self._lost(now, now)
            case Link.READY if self._has_work():
                if now - self._heard >= SILENCE:
                    self._lost(now, self._heard)
                elif now - self._pinged >= PING_EVERY:
                    self._pinged = now
                    self._nonce += 1
                    self._send(Ping(nonce=self._nonce))

    def _tick_flights(self, now: float) -> None:
        due = [flight for flight in self._flights.values() if flight.resume_at is not None and now >= flight.resume_at]
        late = [flight for flight in self._flights.values() if flight.submitted_before(now - RESEND_AFTER)]
        for flight in due:
            flight.resume_at = None
        self._submit([*due, *late], now)
        still = [flight for flight in self._flights.values() if flight.accepted and now - flight.news_at >= PROBE_AFTER]
        for flight in still:
            flight.news_at = now
        self._attach(still, now)

    def _overdue(self, flight: Flight, now: float) -> HeadraceError | None:
        """The error that ends a request which waited too long, for whatever it waits."""
        limits = self._timeouts
        if flight.deadline is not None and now >= flight.deadline:
            return DeadlineExceededError(
                f"The answer was not complete within the {flight.spec.timeout:g} s allowed; allow more or ask for fewer tokens.",
                request_id=flight.id.hex(),
            )
        unheard = not flight.accepted and not flight.has_tokens
        if self.link is not Link.READY and unheard and now >= flight.since:
            return self._unanswered(flight.since, now)
        begun = flight.has_tokens
        limit = limits.between_tokens if begun else limits.first_token
        since = flight.progress_at if begun else flight.started
        if limit is None or now - since < limit:
            return None
        what = f"no further token within {limit:g} s" if begun else f"no first token within {limit:g} s"
        why = (
            "the workers are stuck or overloaded; see `headrace status`"
            if self.link is Link.READY
            else f"the broker at {self._endpoint} went away and did not come back"
        )
        return RequestTimeoutError(f"There was {what}: {why}.", request_id=flight.id.hex())

    def _unanswered(self, asked_at: float, now: float) -> HeadraceError | None:
        if self.link is Link.READY:
            if now - asked_at < ANSWER_WITHIN:
                return None
            return RequestTimeoutError(
                f"The broker at {self._endpoint} did not answer a question within {ANSWER_WITHIN:g} s; look at its log."
            )
        if now - max(asked_at, self._down_since) < self._timeouts.connect:
            return None
        return BrokerConnectionError(
            f"There is no broker at {self._endpoint}: none answered within {self._timeouts.connect:g} s. "
            "Start one with `headrace up`, or set HEADRACE_ENDPOINT to where it listens."
        )

    # ------------------------------------------------------------------------------------------------------ ends

    def _fail(self, ticket: int, error: HeadraceError) -> None:
        self._asks.pop(ticket, None)
        if (flight := self._flights.get(ticket)) is not None:
            self._forget(flight)
            error = with_id(error, flight.id.hex())
        self._out.append(Emit(ticket, Failed(error), True))

    def _forget(self, flight: Flight, *, keep_acks: bool = False) -> None:
        del self._flights[flight.ticket]
        del self._by_id[flight.id]
        if not keep_acks:
            self._discard_acks(flight)

    def _discard_acks(self, flight: Flight) -> None:
        for number in range(len(flight.choices)):
            self._dirty.pop((flight.id, number), None)
        if not self._dirty:
            self._ack_at = None

    def flights(self) -> Iterator[Flight]:
        """The requests that have not ended, for tests and for looking in."""
        return iter(self._flights.values())


def with_id(error: HeadraceError, request_id: str) -> HeadraceError:
    """A new error like this one that names the request: several requests may fail of one cause."""
    fresh = type(error)(
        error.message, param=error.param, retry_after=error.retry_after, request_id=error.request_id or request_id
    )
    fresh.__cause__ = error.__cause__
    return fresh
