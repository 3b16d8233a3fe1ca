"""Milliseconds for a batch, from handing over the prompts to holding all tokens; in turns with the peers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from headrace.benchmarks.costs import Cost, Costs
from headrace.benchmarks.decode import step_cost
from headrace.benchmarks.measure import Case, Measure, Timeline

__all__ = ["LATENCY", "whole_cost"]


def whole_cost(costs: Costs, case: Case) -> Sequence[Cost]:
    """The prompts, then as many steps as there are tokens after the first."""
    steps = case.output_tokens - 1
    return [costs.prompts(case.batch, case.prompt_tokens), *([step_cost(costs, case)] * steps)]


def _details(case: Case, timelines: Sequence[Timeline]) -> dict[str, float]:
    total, first = (statistics.median(getattr(t, name) for t in timelines) for name in ("total", "first"))
    found = {"first_token_ms": first * 1e3, "tokens_per_s": case.batch * case.output_tokens / total}
    if total > first and case.output_tokens > 1:
        found["decode_tokens_per_s"] = case.batch * (case.output_tokens - 1) / (total - first)
    return found


LATENCY = Measure(
    name="latency",
    title="Latency: ms for a batch, prompts to last tokens",
    unit="ms",
    cost=whole_cost,
    times=lambda timeline: [timeline.total],
    figure=lambda case, seconds: seconds * 1e3,
    details=_details,
)
