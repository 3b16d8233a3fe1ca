"""The client's side of the wire, pure: events in, actions out, time as an argument; no socket, clock or thread.

Laws
 1. A token index is delivered once and in order: lower ones are dropped, a gap is asked for again and nothing after it
    is delivered meanwhile. Runs of attempts older than the newest one seen are dropped.
 2. Every request ends exactly once: with the ends of all its choices, or with one error.
 3. Before its first token a request may be tried again, after it only resumed; a token that was delivered stays.
 4. Nothing but Hello is said before Welcome. A connection that fell silent, or whose broker does not know it, is never
    mended: it is dropped, and after a while there is a new one (`headrace.client.link` has the table).

On a new connection the session submits the requests that no broker took, attaches to the others from where they stand,
and asks its questions again. A broker that does not know a request any more gets it submitted with the tokens so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from headrace.client.events import (
    Action,
    Ask,
    Close,
    Drop,
    Ended,
    Event,
    Failed,
    LinkFailed,
    NewTokens,
    Received,
    Start,
    Tick,
)
from headrace.client.flights import Flight, Flights
from headrace.client.link import Connection, Link
from headrace.client.outbox import Outbox
from headrace.client.overdue import Overdue
from headrace.client.questions import Questions
from headrace.client.receipts import Receipts
from headrace.client.types import Timeouts
from headrace.errors import (
    HeadraceError,
    ProtocolError,
    RequestCancelledError,
    ServiceError,
    UnknownRequestError,
    UnsupportedVersionError,
    from_wire,
)
from headrace.messages import (
    Accepted,
    Attach,
    Blob,
    Cancel,
    Cards,
    Describe,
    Done,
    Error,
    Finish,
    GetBlob,
    GetStatus,
    Pong,
    Request,
    Status,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
    unpack_tokens,
)

__all__ = ["Session"]

_SCAN_EVERY = 0.1  # how late a timeout may be
_ASK_AGAIN = 1.0  # between two questions for the same gap
_RESEND_AFTER = 5.0  # a submit that was not accepted by then is sent again; ids make that harmless
_PROBE_AFTER = 10.0  # a stream that stood still for this long asks whether it missed something
_SUBMIT_BYTES = 4 << 20
_SUBMIT_COUNT = 256
_ATTACH_COUNT = 1024
_RESUBMITS = 5  # of a request that the broker says it does not know, without a token in between


class Session:
    """All requests of one client and its connection to the broker.

    Args:
        endpoint: of the broker, for messages to people.
        timeouts: of requests and of the connection.
        retries: how often a request is tried again after an error that may pass.
        random: draws ids, seeds and waiting times.
        name: what the broker's log calls this client.
    """

    def __init__(self, endpoint: str, *, timeouts: Timeouts, retries: int, random: Random, name: str = "") -> None:
        self._retries = retries
        self._random = random
        self._outbox = Outbox()
        self._link = Connection(self._outbox, random, name)
        self._flights = Flights()
        self._questions = Questions(self._outbox)
        self._receipts = Receipts(self._outbox)
        self._overdue = Overdue(endpoint, timeouts)
        self._cancels: dict[bytes, None] = {}  # to be said once there is a connection
        self._scan_at = 0.0

    def handle(self, event: Event, now: float) -> list[Action]:
        """Everything that follows from an event, in order."""
        if self.link is Link.CLOSED:
            return []
        match event:
            case Received():
                self._received(event.message, now)
            case Tick():
                self._tick(now)
            case Start():
                self._start(event, now)
            case Drop():
                self._drop(event.ticket)
            case Ask():
                self._ask(event, now)
            case LinkFailed():
                self._give_up(event.error)
            case Close():
                self._close()
        if not self._has_work():
            self._link.rest()
        if not self._link.ready:
            self._receipts.clear()  # the next connection tells the positions anyway
        return self._outbox.take()

    @property
    def link(self) -> Link:
        """What there is between this client and the broker."""
        return self._link.state

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything and the broker is owed nothing."""
        return not self._has_work() and self._receipts.due_at is None

    def wake_at(self) -> float | None:
        """When to send a Tick at the latest; None if there is nothing to wait for."""
        due_at = self._receipts.due_at
        if not self._has_work():
            return due_at
        return self._scan_at if due_at is None else min(self._scan_at, due_at)

    def validate(self) -> None:
        """Assert what must hold between events."""
        self._flights.validate()
        self._receipts.validate()
        assert self._link.ready or self._has_work() == (self.link in (Link.GREETING, Link.BACKOFF))
        assert self._link.ready or self._receipts.due_at is None

    def _has_work(self) -> bool:
        return bool(self._flights or self._questions)

    # ------------------------------------------------------------------------------------------ the caller's wishes

    def _start(self, event: Start, now: float) -> None:
        self._work_begins(now)
        flights = [Flight(ticket, spec, self._random, now) for ticket, spec in event.requests]
        for flight in flights:
            self._flights.add(flight)
        if self._link.ready:
            self._submit(flights, now)

    def _ask(self, event: Ask, now: float) -> None:
        self._work_begins(now)
        if self._questions.add(event.ticket, event.question, now) and self._link.ready:
            self._outbox.send(event.question)

    def _drop(self, ticket: int) -> None:
        self._questions.remove(ticket)
        if (flight := self._flights.get(ticket)) is not None:
            self._forget(flight)
            self._cancel(flight)

    def _close(self) -> None:
        self._cancels.update({flight.id: None for flight in self._flights if flight.sent_at is not None})
        self._say_cancels()
        self._fail_all(RequestCancelledError("The client was closed before the answer was complete."))
        self._link.drop(Link.CLOSED)

    def _work_begins(self, now: float) -> None:
        if not self._has_work():
            self._scan_at = now + _SCAN_EVERY
            self._link.work_begins(now)

    # ------------------------------------------------------------------------------------- what is said to the broker

    def _submit(self, flights: Iterable[Flight], now: float) -> None:
        batch: list[Request] = []
        size = 0
        for flight in flights:
            request = flight.submission(now)
            weight = len(request.prompt) + sum(map(len, request.output))
            if batch and (size + weight > _SUBMIT_BYTES or len(batch) == _SUBMIT_COUNT):
                self._outbox.send(Submit(requests=tuple(batch)))
                batch, size = [], 0
            batch.append(request)
            size += weight
        if batch:
            self._outbox.send(Submit(requests=tuple(batch)))

    def _attach(self, flights: Iterable[Flight], now: float) -> None:
        positions = [ack for flight in flights for ack in flight.positions(now)]
        for start in range(0, len(positions), _ATTACH_COUNT):
            self._outbox.send(Attach(positions=tuple(positions[start : start + _ATTACH_COUNT])))

    def _cancel(self, flight: Flight) -> None:
        if flight.sent_at is not None:
            self._cancels[flight.id] = None
            self._say_cancels()

    def _say_cancels(self) -> None:
        if self._cancels and self._link.ready:
            self._outbox.send(Cancel(requests=tuple(self._cancels)))
            self._cancels.clear()

    # -------------------------------------------------------------------------------------------- what the broker says

    def _received(self, message: Any, now: float) -> None:
        answers_hello = isinstance(message, Welcome) or (isinstance(message, Error) and not message.request)
        if not self._link.ready and not (self.link is Link.GREETING and answers_hello):
            return  # the last words of a connection that was given up
        self._link.heard(now)
        if isinstance(message, Tokens | Done | Accepted | Cards | Status | Blob):
            self._link.went_well()
        match message:
            case Tokens():
                for run in message.runs:
                    self._run(run, now)
            case Done():
                for finish in message.finishes:
                    self._finish(finish, now)
                self._receipts.say()
            case Accepted():
                self._accepted(message, now)
            case Error():
                self._error(message, now)
            case Welcome():
                self._welcomed(now)
            case Cards():
                self._questions.answer(Describe(), message.cards)
            case Status():
                self._questions.answer(GetStatus(), message.report)
            case Blob():
                self._questions.answer(GetBlob(hash=message.hash, offset=message.offset), message)
            case Pong():
                pass

    def _welcomed(self, now: float) -> None:
        if self._link.ready:
            return  # the answer to a greeting that was said twice
        self._link.welcomed(now)
        self._say_cancels()
        self._submit([flight for flight in self._flights if flight.fresh], now)
        self._attach([flight for flight in self._flights if flight.accepted], now)
        self._questions.ask_all()

    def _accepted(self, message: Accepted, now: float) -> None:
        for acceptance in message.requests:
            if (flight := self._flights.find(acceptance.request)) is not None:
                flight.accepted = True
                flight.news_at = now

    def _run(self, run: TokenRun, now: float) -> None:
        flight = self._flights.find(run.request)
        if flight is None or not 0 <= run.choice < len(flight.choices):
            return
        choice = flight.choices[run.choice]
        if run.attempt < choice.attempt or len(run.tokens) % 4:
            return
        flight.accepted = True
        if choice.ended:
            self._receipts.note(flight, run.choice, now)
            return
        choice.attempt = run.attempt
        known = len(choice.output) - run.first
        if known < 0:
            self._gap(flight, now)
            return
        tokens = unpack_tokens(run.tokens)[known:]
        if not tokens:
            # It comes again because its acknowledgement was lost: in silence the broker would take us for stuck.
            self._receipts.note(flight, run.choice, now)
            return
        choice.output.extend(tokens)
        flight.progress(now)
        logprobs = None if run.logprobs is None else run.logprobs[known:]
        self._outbox.tell(flight.ticket, NewTokens(flight.id, run.choice, tokens, logprobs), last=False)
        self._receipts.note(flight, run.choice, now)

    def _gap(self, flight: Flight, now: float) -> None:
        if now >= flight.ask_again_at:
            flight.ask_again_at = now + _ASK_AGAIN
            self._attach([flight], now)

    def _finish(self, finish: Finish, now: float) -> None:
        flight = self._flights.find(finish.request)
        if flight is None:
            self._receipts.stray(finish, now)
            return
        flight.accepted = True
        if not 0 <= finish.choice < len(flight.choices):
            return
        choice = flight.choices[finish.choice]
        if choice.ended or finish.attempt < choice.attempt:
            return
        if finish.total > len(choice.output):
            self._gap(flight, now)
            return
        choice.ended = True
        flight.progress(now)
        over = all(choice.ended for choice in flight.choices)
        self._outbox.tell(flight.ticket, Ended(flight.id, finish.choice, finish.reason, finish.cached), last=over)
        self._receipts.note(flight, finish.choice, now)
        if over:
            self._flights.remove(flight)

    # ---------------------------------------------------------------------------------------------------- errors

    def _error(self, message: Error, now: float) -> None:
        error = from_wire(message.error)
        if message.request:
            if (flight := self._flights.find(message.request)) is not None:
                self._flight_error(flight, error, now)
        elif isinstance(error, UnsupportedVersionError):
            self._give_up(error)
        elif isinstance(error, ProtocolError):
            # Above all "say Hello first": the broker is not the one we greeted. It takes a new connection.
            if not self._link.misunderstood(now):
                self._give_up(error)
        elif isinstance(error, ServiceError) and error.retryable:
            # It takes no more clients, or it is about to stop.
            self._link.refused(error, now)
        else:
            for ticket in self._questions.refused(error.param):
                self._fail(ticket, error)

    def _flight_error(self, flight: Flight, error: HeadraceError, now: float) -> None:
        if isinstance(error, UnknownRequestError) and flight.unknown < _RESUBMITS:
            flight.unknown += 1
            flight.accepted = False
            self._submit([flight], now)
            return
        if error.retryable and flight.tries < self._retries:
            flight.tries += 1
            wait = max(error.retry_after or 0.0, 0.25 * 2.0**flight.tries * self._random.uniform(0.75, 1.0))
            if flight.deadline is None or now + wait < flight.deadline:
                # The broker may remember the old id together with this error, so it takes a new one.
                self._receipts.discard(flight)
                self._flights.postpone(flight, now + wait, self._random)
                return
        self._fail(flight.ticket, error)

    def _give_up(self, error: HeadraceError) -> None:
        """There is no way to that broker: waiting would not help."""
        self._fail_all(error)
        self._link.drop(Link.IDLE)

    def _fail_all(self, error: HeadraceError) -> None:
        for ticket in [*(flight.ticket for flight in self._flights), *self._questions]:
            self._fail(ticket, error)

    def _fail(self, ticket: int, error: HeadraceError) -> None:
        request_id = error.request_id
        if (flight := self._flights.get(ticket)) is not None:
            request_id = flight.id.hex()
            self._forget(flight)
        self._questions.remove(ticket)
        # A new error for each: several may fail of one cause, and each is raised somewhere else.
        own = type(error)(error.message, param=error.param, retry_after=error.retry_after, request_id=request_id)
        own.__cause__ = error.__cause__
        self._outbox.tell(ticket, Failed(own), last=True)

    def _forget(self, flight: Flight) -> None:
        self._flights.remove(flight)
        self._receipts.discard(flight)

    # ------------------------------------------------------------------------------------------------------ time

    def _tick(self, now: float) -> None:
        due_at = self._receipts.due_at
        if due_at is not None and now >= due_at:
            self._receipts.say()
        if not self._has_work() or now < self._scan_at:
            return
        self._scan_at = now + _SCAN_EVERY
        for flight in self._flights:
            if (error := self._overdue.flight(flight, self._link, now)) is not None:
                self._cancel(flight)
                self._fail(flight.ticket, error)
        for ticket in self._questions:
            if (error := self._overdue.question(self._questions.asked_at(ticket), self._link, now)) is not None:
                self._fail(ticket, error)
        if self._has_work():
            self._link.tick(now)
        if self._link.ready:
            self._go_on(now)

    def _go_on(self, now: float) -> None:
        """Submit what waited long enough, and ask after what stands still."""
        due = [flight for flight in self._flights if flight.resume_at is not None and now >= flight.resume_at]
        late = [flight for flight in self._flights if flight.submitted_before(now - _RESEND_AFTER)]
        for flight in due:
            flight.resume_at = None
        self._submit([*due, *late], now)
        still = [flight for flight in self._flights if flight.accepted and now - flight.news_at >= _PROBE_AFTER]
        self._attach(still, now)

    def flights(self) -> Iterable[Flight]:
        """The requests that have not ended, for tests and for looking in."""
        return self._flights
