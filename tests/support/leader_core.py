"""Driving the core of a leader: events to feed, and what to look at in the actions that follow."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from headrace.messages import Assign, Assignment, Drained, Finish, Heartbeat, Refusal, TokenRun, pack_tokens
from headrace.workers.leader import Leader
from headrace.workers.leader_events import Action, Received, Send
from tests.support.fake_group import fake_card

__all__ = ["LAST_WORDS", "A", "B", "assign", "assignment", "make_leader", "of", "results", "run", "sent"]

A, B = b"a" * 16, b"b" * 16
LAST_WORDS = [Drained(), Heartbeat(step=0, busy=False)]


def make_leader(**blobs: bytes) -> Leader:
    """One that has not done anything yet."""
    return Leader(group="g", card=fake_card(), max_num_seqs=4, kv_tokens=512, blobs=blobs)


def assignment(request: bytes = A, choice: int = 0, attempt: int = 1) -> Assignment:
    """A stream with nothing special about it."""
    return Assignment(request=request, choice=choice, attempt=attempt, prompt=pack_tokens([1]))


def assign(*streams: tuple[bytes, int, int]) -> Received:
    """The broker assigns streams, by (request, choice, attempt)."""
    return Received(Assign(assignments=tuple(assignment(*stream) for stream in streams)))


def run(request: bytes = A, choice: int = 0, attempt: int = 1, first: int = 0) -> TokenRun:
    """One token of a stream."""
    return TokenRun(request, choice, attempt, first, pack_tokens([7]), None)


def results(
    runs: Iterable[TokenRun] = (), finishes: Iterable[Finish] = (), refusals: Iterable[Refusal] = ()
) -> SimpleNamespace:
    """What a step gives."""
    return SimpleNamespace(runs=list(runs), finishes=list(finishes), refusals=list(refusals))


def sent(actions: Iterable[Action], kind: Any = object) -> list[Any]:
    """The messages of a kind among the actions."""
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def of(actions: Iterable[Action], kind: Any) -> list[Any]:
    """The actions of a kind."""
    return [a for a in actions if isinstance(a, kind)]
