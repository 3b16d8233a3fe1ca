"""Milliseconds from one decode step to the next, all sequences decoding: the median over the run.

Time between steps, not within one: an engine that runs ahead of the host returns the tokens of the step before. The
floor reads all weights and the keys and values of a context that grows from the prompt to prompt and output.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from headrace.benchmarks.costs import Cost, Costs
from headrace.benchmarks.measure import Case, Measure, Timeline
from headrace.benchmarks.metrics import spread

__all__ = ["DECODE", "step_cost"]

_SETTLING = 2  # steps after the prompt that still feel it


def step_cost(costs: Costs, case: Case) -> Cost:
    """Of the step in the middle of the output."""
    done = case.output_tokens / 2
    if costs.spec.encoder is not None:
        return costs.step(case.batch, done, case.prompt_tokens)
    return costs.step(case.batch, case.prompt_tokens + done)


def _steady(timeline: Timeline) -> Sequence[float]:
    return timeline.gaps[_SETTLING:] or timeline.gaps


def _details(case: Case, timelines: Sequence[Timeline]) -> dict[str, float]:
    found = spread([gap * 1e3 for timeline in timelines for gap in _steady(timeline)])
    return {
        "mean_ms": found["mean"],
        "p99_ms": found["p99"],
        "steps": found["count"],
        "tokens_per_s": case.batch / found["mean"] * 1e3,
        "first_token_ms": statistics.median(timeline.first for timeline in timelines) * 1e3,
    }


DECODE = Measure(
    name="decode",
    title="Decode: ms from step to step",
    unit="ms",
    cost=lambda costs, case: [step_cost(costs, case)],
    times=_steady,
    figure=lambda case, seconds: seconds * 1e3,
    details=_details,
)
