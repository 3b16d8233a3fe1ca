"""The measurements in process, by name."""

from __future__ import annotations

from headrace.benchmarks.decode import DECODE
from headrace.benchmarks.encode import ENCODE
from headrace.benchmarks.latency import LATENCY
from headrace.benchmarks.measure import Measure
from headrace.benchmarks.prefill import PREFILL
from headrace.benchmarks.throughput import THROUGHPUT

__all__ = ["MEASURES"]

MEASURES: dict[str, Measure] = {measure.name: measure for measure in (DECODE, LATENCY, PREFILL, THROUGHPUT, ENCODE)}
