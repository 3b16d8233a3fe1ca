"""Quantiles, and what the times of a served request are called: vLLM's names and definitions. Pure; seconds in and out.

    TTFT   from sending a request to its first token
    TPOT   time per output token after the first: (E2E - TTFT) / (output tokens - 1), one figure per request
    ITL    inter-token latency: each gap between two arrivals of tokens, of all requests together; tokens that arrive
           together have one gap
    E2E    from sending a request to its last token

Quantiles are interpolated linearly, as numpy's.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Served", "arrivals", "prompts", "quantile", "spread", "summarize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request as its client saw it.

    Attributes:
        sent: when.
        arrivals: when tokens came, each with how many.
        error: why it failed; None if it did not.
    """

    sent: float
    arrivals: tuple[tuple[float, int], ...] = field(default=())
    error: str | None = None

    @property
    def tokens(self) -> int:
        """How many came."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.arrivals[-1][0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for fewer than two."""
        return None if self.tokens < 2 else (self.e2e - self.ttft) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between arrivals."""
        return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(self.arrivals)]


def summarize(requests: Sequence[Served]) -> dict[str, float]:
    """Counts, rates and, in milliseconds, p50 and p99 of all requests that got tokens without an error.

    The duration is from the first request sent to the last token.
    """
    good = [request for request in requests if request.error is None and request.arrivals]
    found: dict[str, float] = {"completed": len(good), "failed": len(requests) - len(good)}
    if not good:
        return found
    duration = max(r.arrivals[-1][0] for r in good) - min(r.sent for r in good)
    found["duration_s"] = duration
    found["output_tokens"] = sum(r.tokens for r in good)
    found["requests_per_s"] = len(good) / duration
    found["tokens_per_s"] = found["output_tokens"] / duration
    values = {
        "ttft": [r.ttft for r in good],
        "tpot": [r.tpot for r in good if r.tpot is not None],
        "itl": [gap for r in good for gap in r.gaps],
        "e2e": [r.e2e for r in good],
    }
    for name, times in values.items():
        if times:
            found[f"{name}_mean_ms"] = statistics.fmean(times) * 1e3
            for share in (50, 99):
                found[f"{name}_p{share}_ms"] = quantile(times, share / 100) * 1e3
    return found


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which a share of all lie."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, p99 and count."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "p99": quantile(values, 0.99),
        "count": len(values),
    }


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When each request is sent, in seconds from the start: a Poisson process of `rate` requests a second, stretched so
    that the last comes after count / rate, as vLLM does it; with an infinite rate all come at once."""
    if math.isinf(rate):
        return [0.0] * count
    draw = random.Random(seed)
    times = list(itertools.accumulate(draw.expovariate(rate) for _ in range(count)))
    stretch = count / rate / times[-1]
    return [time * stretch for time in times]


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens, the same for everybody who gives the same seed."""
    draw = random.Random(seed)
    ids = range(vocab_size)
    return [draw.choices(ids, k=length) for _ in range(count)]
