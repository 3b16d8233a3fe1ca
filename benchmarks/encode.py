"""Milliseconds for an encoder to read a batch of texts, until the results are on the host."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.benchmarks.measure import Case, Measure, Timeline
from headrace.benchmarks.metrics import quantile

__all__ = ["ENCODE"]


def _details(case: Case, timelines: Sequence[Timeline]) -> dict[str, float]:
    times = [timeline.total for timeline in timelines]
    return {"p99_ms": quantile(times, 0.99) * 1e3, "passes": len(times)}


ENCODE = Measure(
    name="encode",
    title="Encoders: ms for one pass",
    unit="ms",
    cost=lambda costs, case: [costs.texts(case.batch, case.prompt_tokens)],
    times=lambda timeline: [timeline.total],
    figure=lambda case, seconds: seconds * 1e3,
    details=_details,
    task="encode",
)
