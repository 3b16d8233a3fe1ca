"""TTFT, TPOT, ITL, E2E as vLLM defines them, on timelines made by hand; quantiles as numpy's; arrivals by a seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headrace.benchmarks.metrics import Served, arrivals, prompts, quantile, spread, summarize

# Sent at 10.0; a token at 10.2, 10.25 and 10.35, two more together at 10.6.
ONE = Served(sent=10.0, arrivals=((10.2, 1), (10.25, 1), (10.35, 1), (10.6, 2)))


def test_one_request():
    assert ONE.tokens == 5
    assert ONE.ttft == pytest.approx(0.2)
    assert ONE.e2e == pytest.approx(0.6)
    assert ONE.tpot == pytest.approx((0.6 - 0.2) / 4)
    assert ONE.gaps == pytest.approx([0.05, 0.1, 0.25])


def test_one_token_has_no_time_per_token():
    one = Served(sent=1.0, arrivals=((1.5, 1),))

    assert one.tpot is None
    assert one.gaps == []
    assert summarize([one])["ttft_p50_ms"] == pytest.approx(500)
    assert "tpot_p50_ms" not in summarize([one])


def test_many_requests():
    """TPOT is one figure per request; ITL pools the gaps of all, so a long request weighs more."""
    other = Served(sent=11.0, arrivals=((11.4, 1), (12.0, 1)))
    failed = Served(sent=10.5, error="refused")
    found = summarize([ONE, other, failed])

    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["duration_s"] == pytest.approx(2.0)  # from 10.0 to 12.0
    assert found["tokens_per_s"] == pytest.approx(7 / 2.0)
    assert found["requests_per_s"] == pytest.approx(1.0)
    assert found["ttft_p50_ms"] == pytest.approx(300)
    assert found["tpot_mean_ms"] == pytest.approx((100 + 600) / 2)
    assert found["itl_p50_ms"] == pytest.approx((100 + 250) / 2)
    assert found["itl_mean_ms"] == pytest.approx((50 + 100 + 250 + 600) / 4)
    assert found["e2e_p99_ms"] == pytest.approx(600 + 0.99 * 400)


def test_nothing_that_came():
    assert summarize([Served(sent=0.0, error="no broker")]) == {"completed": 0, "failed": 1}


@pytest.mark.parametrize("share", [0, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_quantiles_are_those_of_numpy(share, count):
    values = [((7 * n) % 31) ** 2 / 3 for n in range(count)]

    assert quantile(values, share) == pytest.approx(np.percentile(values, 100 * share))


def test_spread():
    assert spread([1.0, 2.0, 6.0]) == {"median": 2.0, "mean": 3.0, "p99": pytest.approx(5.92), "count": 3}


def test_arrivals_follow_the_seed():
    times = arrivals(50, 10.0, seed=3)

    assert times == arrivals(50, 10.0, seed=3) != arrivals(50, 10.0, seed=4)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(5.0)  # stretched to count / rate
    gaps = np.diff([0.0, *times])
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.35)  # exponential, not even


def test_an_infinite_rate_sends_all_at_once():
    assert arrivals(3, math.inf, seed=1) == [0.0, 0.0, 0.0]


def test_prompts_follow_the_seed():
    one = prompts(2, 8, 300, seed=1)

    assert one == prompts(2, 8, 300, seed=1) != prompts(2, 8, 300, seed=2)
    assert [len(prompt) for prompt in one] == [8, 8]
    assert one[0] != one[1]
    assert all(0 <= token < 300 for prompt in one for token in prompt)
