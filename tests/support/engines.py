"""Driving an engine in tests: assignments in, tokens and ends out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import HeadraceError, from_wire
from headrace.messages import Assignment, StreamId, pack_tokens, unpack_tokens
from headrace.workers.engine import Engine, StepResult

__all__ = ["Outcome", "assign", "generate", "run"]


@dataclass
class Outcome:
    """What one stream got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    reason: str | None = None
    cached: int = 0
    error: HeadraceError | None = None


def assign(
    prompt: Sequence[int],
    *,
    request: int = 0,
    choice: int = 0,
    attempt: int = 1,
    output: Sequence[int] = (),
    budget_ms: int | None = None,
    **sampling: Any,
) -> Assignment:
    """A stream; greedy, 16 tokens and no end token unless `sampling` says else."""
    settings = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | sampling
    return Assignment(
        request=request.to_bytes(16, "big"),
        choice=choice,
        attempt=attempt,
        prompt=pack_tokens(prompt),
        output=pack_tokens(output),
        sampling=settings,
        budget_ms=budget_ms,
    )


def collect(outcomes: dict[StreamId, Outcome], result: StepResult) -> None:
    """Add a step's result, checking that indexes have neither gap nor repeat."""
    for run_ in result.runs:
        outcome = outcomes[StreamId(*run_[:3])]
        outcome.tokens += unpack_tokens(run_.tokens)
        outcome.logprobs += run_.logprobs or []
    for finish in result.finishes:
        outcome = outcomes[StreamId(*finish[:3])]
        outcome.reason, outcome.cached = finish.reason, finish.cached
    for refusal in result.refusals:
        outcomes[StreamId(*refusal[:3])].error = from_wire(refusal.error)


def run(engine: Engine, assignments: Sequence[Assignment], now: float = 0.0) -> list[Outcome]:
    """Run streams together to their ends."""
    outcomes = {StreamId(a.request, a.choice, a.attempt): Outcome() for a in assignments}
    for assignment in assignments:
        engine.add(assignment, now)
        engine.validate()
    while engine.has_work:
        collect(outcomes, engine.step(now))
        engine.validate()
    return list(outcomes.values())


def generate(engine: Engine, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
    """The tokens that follow each prompt."""
    streams = [assign(prompt, request=index, **sampling) for index, prompt in enumerate(prompts)]
    return [outcome.tokens for outcome in run(engine, streams)]
