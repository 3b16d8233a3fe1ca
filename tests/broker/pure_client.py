"""A client of the broker's core without a socket: it checks every token as it comes, and keeps all that was said."""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

from headrace.broker.events import Face
from headrace.errors import ConflictError, HeadraceError, ProtocolError, UnknownRequestError, from_wire
from headrace.messages import (
    Accepted,
    Ack,
    Attach,
    Cancel,
    Credit,
    Done,
    Error,
    Finish,
    Hello,
    Request,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
    pack_tokens,
    unpack_tokens,
)
from headrace.tasks import GENERATE
from tests.broker.answers import text

if TYPE_CHECKING:
    from tests.broker.world import World


class Record:
    """What a client knows of one of its requests."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.n = int(request.sampling.get("n", 1))
        self.tokens: list[array[int]] = [unpack_tokens(out[: len(out) & ~3]) for out in request.output] or [
            array("I") for _ in range(self.n)
        ]
        self.logprobs: list[list[Any]] = [[] for _ in range(self.n)]
        self.attempt = [request.attempt] * self.n
        self.reason: list[str | None] = [None] * self.n
        self.cached = [0] * self.n
        self.seed: int | None = None
        self.max_tokens: int | None = None
        self.error: HeadraceError | None = None
        self.cancelled = False
        self.gaps = 0
        self.fingerprint = "f0"  # of the card that was served when it began

    @property
    def ended(self) -> bool:
        """Whether nothing more may come."""
        return self.error is not None or None not in self.reason

    def check(self) -> None:
        """Assert that what came is a part of the right answer, and all of it once it ended well."""
        if self.seed is None or self.max_tokens is None:
            return
        eos = bool(self.request.sampling.get("ignore_eos"))
        for choice, tokens in enumerate(self.tokens):
            whole, reason = text(self.seed, choice, self.max_tokens, ignore_eos=eos or self.request.task != GENERATE)
            assert list(tokens) == whole[: len(tokens)], (choice, list(tokens), whole)
            if self.reason[choice] in ("stop", "length"):
                assert (list(tokens), self.reason[choice]) == (whole, reason)


class PureClient:
    """A client.

    `acks`: it confirms what it reads. `polite`: it greets a broker that does not know it. `silent`: it sends no pings.
    """

    def __init__(self, world: World, name: str = "c") -> None:
        self.world = world
        self.name = name
        self.peer = world.new_peer(name)
        self.acks = self.polite = True
        self.silent = False
        self.conflicts = 0
        self.records: dict[bytes, Record] = {}
        self.inbox: deque[Any] = deque()
        self.said: list[Any] = []  # all that the broker ever said here
        self.welcome: Welcome | None = None
        self.errors: list[HeadraceError] = []  # of the connection
        world.clients[self.peer] = self

    def hello(self) -> PureClient:
        """Connect."""
        self.send(Hello())
        return self

    def send(self, message: Any) -> None:
        """Say something."""
        self.world.receive(Face.CLIENTS, self.peer, message)

    def submit(self, *requests: Request) -> list[Record]:
        """Submit requests, new or known."""
        for each in requests:
            self.records.setdefault(each.id, Record(each))
        self.send(Submit(requests=requests))
        return [self.records[each.id] for each in requests]

    def cancel(self, record: Record) -> None:
        """Cancel a request."""
        record.cancelled = True
        self.send(Cancel(requests=(record.request.id,)))

    def attach(self, *records: Record) -> None:
        """Go on from what is held."""
        acks = [
            Ack(record.request.id, choice, len(record.tokens[choice]), record.reason[choice] is not None)
            for record in records
            for choice in range(record.n)
        ]
        if acks:
            self.send(Attach(positions=tuple(acks)))

    def confirm(self, *records: Record) -> None:
        """Acknowledge what is held."""
        acks = [
            Ack(record.request.id, choice, len(record.tokens[choice]), record.reason[choice] is not None)
            for record in records
            for choice in range(record.n)
        ]
        if acks:
            self.send(Credit(acks=tuple(acks)))

    def reconnect(self) -> None:
        """A new connection: take over what is not complete."""
        self.world.clients.pop(self.peer)
        self.inbox.clear()
        self.welcome = None
        self.peer = self.world.new_peer(self.name)
        self.world.clients[self.peer] = self
        self.hello()

    def read(self) -> None:
        """Take in what came."""
        touched: dict[bytes, Record] = {}
        while self.inbox:
            message = self.inbox.popleft()
            self.said.append(message)
            if isinstance(message, Tokens):
                for run in message.runs:
                    self._take_run(run, touched)
            elif isinstance(message, Done):
                for finish in message.finishes:
                    self._take_finish(finish, touched)
            elif isinstance(message, Error):
                self._take_error(message)
            elif isinstance(message, Accepted):
                for acceptance in message.requests:
                    record = self.records[acceptance.request]
                    assert record.seed in (None, acceptance.seed)
                    assert record.max_tokens in (None, acceptance.max_tokens)
                    record.seed, record.max_tokens = acceptance.seed, acceptance.max_tokens
            elif isinstance(message, Welcome):
                self.welcome = message
                left = [record for record in self.records.values() if not record.ended]
                self.attach(*(record for record in left if record.seed is not None))
                self.submit(*(self.again(record) for record in left if record.seed is None))
        gaps = [record for record in touched.values() if record.gaps]
        for record in gaps:
            record.gaps = 0
        self.attach(*gaps)
        if self.acks:
            self.confirm(*touched.values())

    def _take_run(self, run: TokenRun, touched: dict[bytes, Record]) -> None:
        record = self.records[run.request]
        touched[run.request] = record
        held = record.tokens[run.choice]
        if record.ended or run.attempt < record.attempt[run.choice]:
            return
        record.attempt[run.choice] = run.attempt
        known = len(held) - run.first
        if known < 0:
            record.gaps += 1
            return
        new = unpack_tokens(run.tokens)[known:]
        held.extend(new)
        if run.logprobs is not None:
            assert len(run.logprobs) == len(run.tokens) // 4
            record.logprobs[run.choice] += run.logprobs[known:]
        record.check()

    def _take_finish(self, finish: Finish, touched: dict[bytes, Record]) -> None:
        record = self.records[finish.request]
        touched[finish.request] = record
        if record.error is not None or record.reason[finish.choice] is not None:
            return
        if finish.total > len(record.tokens[finish.choice]):
            record.gaps += 1
            return
        assert finish.total == len(record.tokens[finish.choice])
        assert finish.reason != "cancelled" or record.cancelled
        record.reason[finish.choice] = finish.reason
        record.cached[finish.choice] = finish.cached
        record.check()

    def _take_error(self, message: Error) -> None:
        error = from_wire(message.error)
        record = self.records.get(message.request)
        if record is None:
            self.errors.append(error)
            if isinstance(error, ProtocolError) and self.polite:
                self.hello()
        elif isinstance(error, ConflictError):
            self.conflicts += 1
        elif isinstance(error, UnknownRequestError) and not record.cancelled:
            self.submit(self.again(record))
        elif not record.ended:
            record.error = error

    def again(self, record: Record) -> Request:
        """The request as a client submits it to a broker that does not know it."""
        first = record.request
        begun = any(record.tokens)
        return dataclasses.replace(
            first,
            sampling=first.sampling if record.seed is None else {**first.sampling, "seed": record.seed},
            output=tuple(pack_tokens(tokens) for tokens in record.tokens) if begun else (),
            attempt=max(record.attempt),
            fingerprint=first.fingerprint or (record.fingerprint if begun else ""),
        )
