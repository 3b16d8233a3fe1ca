"""Output tokens per second, many requests handed over at once, in process; prompts count as time, not as tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from headrace.benchmarks.latency import whole_cost
from headrace.benchmarks.measure import Case, Measure, Timeline

__all__ = ["THROUGHPUT"]


def _details(case: Case, timelines: Sequence[Timeline]) -> dict[str, float]:
    total = statistics.median(timeline.total for timeline in timelines)
    return {"duration_s": total, "requests_per_s": case.batch / total}


THROUGHPUT = Measure(
    name="throughput",
    title="Throughput: output tokens per second, all requests at once",
    unit="tok/s",
    cost=whole_cost,
    times=lambda timeline: [timeline.total],
    figure=lambda case, seconds: case.batch * case.output_tokens / seconds,
    details=_details,
    more_is_better=True,
)
