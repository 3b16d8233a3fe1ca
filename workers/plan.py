"""The plan: what every rank of a group does, in one order, decided by the leader alone.

A turn is a list of calls (streams to take on or drop), then one step at a time that all ranks agree on. The leader
writes it into a pipe per follower before it carries it out itself:

    Assign | Revoke | RevokeAll   any number, as they came from the broker
    Step                          carry these out, then compute a step
    Stop                          end in good order

Ranks compute the same tokens from the same plan. Every so often a Step carries a digest of everything before it, plan
and results; a follower whose own differs ends with an error, and the launcher ends the rest of the group.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from headrace.codec import decode, encode
from headrace.errors import HeadraceError, InternalError
from headrace.messages import Assign, Assignment, Finish, Refusal, Revoke, StreamId, TokenRun

__all__ = ["CHECK_EVERY", "Call", "Engine", "PlanWriter", "Results", "RevokeAll", "Step", "Stop", "carry_out", "follow"]

logger = logging.getLogger(__name__)

CHECK_EVERY = 64  # steps between two comparisons of digests


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeAll:
    """Drop all streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Carry out the calls since the last one, then compute a step, both at `now` by the leader's clock."""

    now: float
    digest: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The group ends in good order."""


Call = Assign | Revoke | RevokeAll
_KINDS = (Assign, Revoke, RevokeAll, Step, Stop)


class Results(Protocol):
    """What a step gives, see `headrace.workers.engine.StepResult`."""

    @property
    def runs(self) -> Sequence[TokenRun]:
        """New tokens."""

    @property
    def finishes(self) -> Sequence[Finish]:
        """Ends."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """Streams that cannot go on."""


class Engine(Protocol):
    """The part of `headrace.workers.engine.Engine` that a plan is carried out on."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, assignment: Assignment, now: float) -> None:
        """Take a stream on."""

    def revoke(self, stream: StreamId) -> None:
        """Drop a stream."""

    def revoke_all(self) -> None:
        """Drop all streams."""

    def step(self, now: float) -> Results:
        """Compute one step."""


def carry_out(engine: Engine, calls: Iterable[Call], now: float) -> tuple[list[Refusal], Results | None]:
    """Make the calls, then a step if there is work; what could not be taken on, and what came of the step."""
    refusals: list[Refusal] = []
    for call in calls:
        match call:
            case Assign():
                refusals += [r for a in call.assignments if (r := _add(engine, a, now)) is not None]
            case Revoke():
                for stream in call.streams:
                    engine.revoke(stream)
            case RevokeAll():
                engine.revoke_all()
    return refusals, engine.step(now) if engine.has_work else None


def _add(engine: Engine, assignment: Assignment, now: float) -> Refusal | None:
    try:
        engine.add(assignment, now)
    except HeadraceError as error:
        problem = error
    except Exception as error:
        # A bug of ours in what one request asks for costs that request, on every rank alike.
        logger.exception("request %s could not be taken on", assignment.request.hex())
        problem = InternalError(f"The engine could not take the request on: {type(error).__name__}: {error}.")
    else:
        return None
    return Refusal(assignment.request, assignment.choice, assignment.attempt, problem.to_wire())


class _Digest:
    """Of plan and results so far."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add_frame(self, frame: bytes) -> None:
        self._hash.update(frame)

    def add_results(self, refusals: Sequence[Refusal], results: Results | None) -> None:
        for refusal in (*refusals, *(results.refusals if results is not None else ())):
            self._hash.update(refusal.request)
        if results is not None:
            for run in results.runs:
                self._hash.update(run.request)
                self._hash.update(run.tokens)
            for finish in results.finishes:
                self._hash.update(finish.request)

    def value(self) -> bytes:
        return self._hash.copy().digest()


class PlanWriter:
    """The leader's end. With no followers it costs nothing.

    Args:
        pipes: one to each follower.
        check_every: steps between two comparisons of digests.
    """

    def __init__(self, pipes: Sequence[Connection] = (), *, check_every: int = CHECK_EVERY) -> None:
        self._pipes = tuple(pipes)
        self._check_every = check_every
        self._digest = _Digest()
        self._turns = 0

    def send(self, calls: Iterable[Call], now: float) -> None:
        """Tell the followers what comes; waits for one that is far behind.

        Raises:
            OSError: a follower is gone.
        """
        if not self._pipes:
            return
        self._turns += 1
        for call in calls:
            self._write(_frame(call))
        digest = self._digest.value() if self._turns % self._check_every == 0 else b""
        self._write(_frame(Step(now=now, digest=digest)))

    def note(self, refusals: Sequence[Refusal], results: Results | None) -> None:
        """Remember what came of it, for the next comparison."""
        if self._pipes:
            self._digest.add_results(refusals, results)

    def stop(self) -> None:
        """Let the followers end in good order."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it ended before
                pipe.send_bytes(_frame(Stop()))

    def _write(self, frame: bytes) -> None:
        self._digest.add_frame(frame)
        for pipe in self._pipes:
            pipe.send_bytes(frame)


def follow(engine: Engine, pipe: Connection) -> None:
    """Carry out the leader's plan until it says Stop.

    Raises:
        InternalError: this rank's results differ from the leader's, or the leader vanished.
    """
    digest = _Digest()
    calls: list[Call] = []
    while True:
        try:
            frame = pipe.recv_bytes()
        except EOFError:
            raise InternalError("The leader of the group is gone.") from None
        kind, _, body = frame.partition(b"\0")
        message = decode([kind, body], _KINDS)
        match message:
            case Stop():
                return
            case Step():
                if message.digest not in (b"", digest.value()):
                    raise InternalError(
                        "This rank computed something else than its leader from the same plan; the group starts over. "
                        "If it happens again, the ranks' hardware or software differ."
                    )
                digest.add_frame(frame)
                digest.add_results(*carry_out(engine, calls, message.now))
                calls = []
            case _:
                digest.add_frame(frame)
                calls.append(message)


def _frame(message: Any) -> bytes:
    return b"\0".join(encode(message))
