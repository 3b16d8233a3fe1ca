"""Sampling on a GPU, or interpreted, chooses as it does on the CPU, which is tested against the plain rules."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from headrace.kernels.ops import sampling as op
from headrace.kernels.ops import sampling_triton
from tests.support.kernels import Kernels, cases, to_device

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = [5, 64, 1000, 40_003, 151_936]
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 20},
    "long-top-k": {"top_k": 3000, "top_p": 0.99},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05, "temperature": 1.5},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
}


def make_rows(count: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """Rows with seeds of every size; every third is greedy."""
    heat = torch.full((count,), temperature)
    heat[::3] = 0.0
    return op.SamplingRows(
        temperature=heat,
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        seeds=torch.randint(-(2**63), 2**63 - 1, (count,)),
        choices=torch.arange(count) % 3,
        positions=torch.arange(count) * 1000,
    )


@cases((), product(VOCABS, [torch.float32, torch.bfloat16]))
def test_greedy_takes_the_first_of_the_largest(kernels: Kernels, case):
    vocab, dtype = case
    logits = torch.randn(9, vocab).mul(2).round().to(dtype)  # full of ties
    assert torch.equal(kernels(op.choose, logits), op.choose(logits))


# Short of one program's tile, on its edge, and cut into parts; filters that list few tokens and many.
@cases(product([5, 1024, 3001], ["plain", "all", "top-p"]), product(VOCABS, SETTINGS))
def test_draws_are_those_of_the_cpu(kernels: Kernels, case):
    vocab, name = case
    for scale, dtype in ((0.1, torch.float32), (3.0, torch.bfloat16), (30.0, torch.float16)):
        logits = (torch.randn(kernels.many(24, 3), vocab) * scale).to(dtype)
        rows = make_rows(len(logits), **SETTINGS[name])
        assert torch.equal(kernels(op.choose, logits, rows), op.choose(logits, rows))


# One program takes a row of several tiles; a list is either soon long, or too short, and then the row itself is read.
@cases(product(SETTINGS, [16, 16384]))
def test_many_tiles_and_lists_of_every_length(kernels: Kernels, case, monkeypatch):
    name, listed = case
    monkeypatch.setattr(sampling_triton, "_PROGRAMS", 1)
    monkeypatch.setattr(sampling_triton, "_FEW", 8)
    monkeypatch.setattr(sampling_triton, "_LISTED", listed)
    for scale in (0.1, 3.0):
        logits = torch.randn(3, 3001) * scale
        rows = make_rows(3, **SETTINGS[name])
        assert torch.equal(kernels(op.choose, logits, rows), op.choose(logits, rows))


@cases(["wider", "every other"])
def test_rows_out_of_larger_tensors(kernels: Kernels, case):
    logits = torch.randn(4, 1000)[:, :777] if case == "wider" else torch.randn(4, 1554)[:, ::2]
    rows = make_rows(4, top_k=5)
    assert torch.equal(kernels(op.choose, logits, rows), op.choose(logits, rows))


def _alike(vocab: int) -> torch.Tensor:
    return torch.zeros(3, vocab)


def _few(vocab: int) -> torch.Tensor:
    logits = torch.full((3, vocab), -math.inf)
    logits[0, vocab - 1], logits[1, 0], logits[2, ::3] = 3.0, -1e38, torch.randn(len(range(0, vocab, 3)))
    return logits


EXTREMES = {
    "alike": _alike,
    "few": _few,
    "far apart": lambda vocab: torch.randn(3, vocab) * 1e4,
    "as far as can be": lambda vocab: torch.randn(3, vocab).clamp(-3.0, 3.0) * 1e38,
}


@cases(product(EXTREMES, [7, 1500]), product(EXTREMES, [50_257]))
@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's word for what is meant to happen
def test_extreme_logits_and_settings(kernels: Kernels, case):
    name, vocab = case
    logits = EXTREMES[name](vocab)
    for filters in (
        {},
        {"temperature": 1e-38},
        {"temperature": 100.0, "top_p": 0.5},
        {"top_k": 1},
        {"top_k": 3, "top_p": 0.6},
        {"top_k": vocab - 1, "top_p": 0.9},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-6},
        {"top_p": 1.0 - 2.0**-24},
        {"min_p": 1.0},
        {"min_p": 0.3, "top_p": 0.8},
    ):
        rows = make_rows(3, **filters)
        assert torch.equal(kernels(op.choose, logits, rows), op.choose(logits, rows)), filters


def edge_is_clear(logits: torch.Tensor, rows: op.SamplingRows) -> bool:
    """Whether no sum of the likeliest tokens of a row comes so close to top_p that rounding could tell."""
    for row, heat, top_k, top_p in zip(logits.double(), rows.temperature, rows.top_k, rows.top_p.double(), strict=True):
        if float(heat) > 0 and float(top_p) < 1:
            values = ((row - row.max()) / heat.double()).sort(descending=True).values
            if 0 < int(top_k) < len(values):
                values = values[values >= values[int(top_k) - 1]]
            if bool(((values.softmax(-1).cumsum(-1) - top_p).abs() < 3e-6).any()):
                return False
    return True


@st.composite
def mixed_rows(draw: st.DrawFn) -> tuple[torch.Tensor, op.SamplingRows]:
    """Rows that want different things of logits with and without ties, held-back tokens and outliers."""
    count, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 1300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(count, vocab, generator=generator) * draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    logits += draw(st.sampled_from([0.0, -100.0, 1000.0]))
    if draw(st.booleans()):
        logits = logits.mul(4).round().div(4)
    held_back = torch.rand(count, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    held_back[:, draw(st.integers(0, vocab - 1))] = False
    logits = logits.masked_fill(held_back, -math.inf).to(draw(st.sampled_from(DTYPES)))

    def column(values: st.SearchStrategy, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=dtype)

    rows = op.SamplingRows(
        temperature=column(st.just(0.0) | st.floats(0.01, 5.0), torch.float32),
        top_k=column(st.just(0) | st.integers(1, 2 * vocab), torch.int64),
        top_p=column(st.just(1.0) | st.floats(0.01, 1.0), torch.float32),
        min_p=column(st.just(0.0) | st.floats(0.0, 1.0), torch.float32),
        seeds=column(st.integers(-(2**63), 2**63 - 1), torch.int64),
        choices=column(st.integers(0, 15), torch.int64),
        positions=column(st.integers(0, 2**31 - 1), torch.int64),
    )
    return logits, rows


@cases(["any mix"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mixed=mixed_rows())
def test_every_mix_of_rows_is_sampled_as_on_the_cpu(kernels: Kernels, case, mixed):
    logits, rows = mixed
    assume(edge_is_clear(logits, rows))
    assert torch.equal(kernels(op.choose, logits, rows), op.choose(logits, rows))


@cases((), ["draws"])
def test_draws_follow_the_probabilities_of_what_is_kept(kernels: Kernels, case):
    probabilities = torch.tensor([0.06, 0.4, 0.03, 0.25, 0.15, 0.01, 0.1])
    count = 8192
    rows = make_rows(count, top_p=0.85)
    rows = dataclasses.replace(rows, temperature=torch.ones(count), positions=torch.arange(count))
    found = kernels(op.choose, probabilities.log().expand(count, -1), rows).bincount(minlength=7)
    assert found[[0, 2, 5]].tolist() == [0, 0, 0]
    expected = count * probabilities / 0.9
    chi_square = ((found - expected) ** 2 / expected)[[1, 3, 4, 6]].sum()
    assert float(chi_square) < 16.3  # 3 degrees of freedom: 0.1% of seeds would fail


@cases((), product(["bfloat16", "float32"], [1, 5, 64]))
def test_one_graph_serves_every_mix_of_rows(kernels: Kernels, case):
    dtype, count = getattr(torch, case[0]), case[1]
    vocab = 50_257
    logits = torch.randn(count, vocab, device="cuda").to(dtype)
    rows = to_device(make_rows(count), "cuda")
    op.choose(logits, rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = op.choose(logits, rows)
    for turn in range(10):
        fresh = make_rows(count, **list(SETTINGS.values())[turn % len(SETTINGS)])
        fresh = dataclasses.replace(
            fresh,
            top_k=torch.where(torch.rand(count) < 0.3, 7, fresh.top_k),
            top_p=torch.where(torch.rand(count) < 0.3, 0.8, fresh.top_p),
        )
        for field in ("temperature", "top_k", "top_p", "min_p", "seeds", "choices", "positions"):
            getattr(rows, field).copy_(getattr(fresh, field))
        values = (torch.randn(count, vocab) * 3.0).to(dtype)
        logits.copy_(values)
        graph.replay()
        assert torch.equal(tokens.cpu(), op.choose(values, fresh)), turn


def check_logprobs(found: op.Logprobs, expected: op.Logprobs) -> None:
    assert torch.equal(found.top_tokens, expected.top_tokens)
    torch.testing.assert_close(found.top, expected.top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-5, atol=1e-5)


@cases((), [torch.bfloat16])
def test_logprobs_can_be_part_of_a_graph(kernels: Kernels, case):
    logits = torch.randn(3, 50_257, device="cuda").to(case)
    tokens = torch.tensor([5, 0, 50_256])
    on_device = tokens.cuda()
    op.logprobs_of(logits, on_device, 5)  # lets libraries set themselves up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op.logprobs_of(logits, on_device, 5)
    for _ in range(3):
        values = (torch.randn(3, 50_257) * 3.0).to(case)
        logits.copy_(values)
        graph.replay()
        check_logprobs(to_device(found, "cpu"), op.logprobs_of(values, tokens, 5))


@cases((), ["words"])
def test_the_generators_words_are_the_same(kernels: Kernels, case):
    counter = tuple(torch.randint(0, 2**32, (1000,)) for _ in range(4))
    key = tuple(torch.randint(0, 2**32, (1000,)) for _ in range(2))
    for found, expected in zip(kernels(op.philox, counter, key), op.philox(counter, key), strict=True):
        assert torch.equal(found, expected)


@cases((), ["noise"])
def test_noise_is_bounded_and_finite_for_every_word(kernels: Kernels, case):
    words = torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    noise = kernels(op.noise_of, words)
    torch.testing.assert_close(noise, op.noise_of(words), rtol=1e-5, atol=1e-5)
    assert float(noise.max()) <= op.MAX_NOISE


@cases([2001], [20_001])
def test_logprobs_are_the_same(kernels: Kernels, case):
    logits, tokens = torch.randn(3, case) * 3, torch.tensor([case - 1, 0, 7])
    check_logprobs(kernels(op.logprobs_of, logits, tokens, 5), op.logprobs_of(logits, tokens, 5))


@cases(product([math.nan, math.inf, -math.inf], [5, 4096]))
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's word for what is meant to happen
def test_a_row_that_holds_no_numbers_fails_alone(kernels: Kernels, case):
    bad, vocab = case
    logits = torch.randn(4, vocab)
    logits[1, slice(None) if bad == -math.inf else vocab // 2] = bad
    for rows in (None, make_rows(4)):
        found = kernels(op.choose, logits, rows)
        assert torch.equal(found, op.choose(logits, rows))
        assert int(found[1]) == -1
