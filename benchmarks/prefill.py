"""Prompt tokens per second: prompts handed over at once, until each has its first token. Nothing comes from a cache."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from headrace.benchmarks.measure import Case, Measure, Timeline

__all__ = ["PREFILL"]


def _details(case: Case, timelines: Sequence[Timeline]) -> dict[str, float]:
    return {"first_token_ms": statistics.median(timeline.first for timeline in timelines) * 1e3}


PREFILL = Measure(
    name="prefill",
    title="Prefill: prompt tokens per second",
    unit="tok/s",
    cost=lambda costs, case: [costs.prompts(case.batch, case.prompt_tokens)],
    times=lambda timeline: [timeline.first],
    figure=lambda case, seconds: case.batch * case.prompt_tokens / seconds,
    details=_details,
    more_is_better=True,
)
