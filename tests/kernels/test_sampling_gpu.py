"""Sampling on a GPU, or interpreted, chooses as it does on the CPU, which is tested against the plain rules."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from headrace.kernels.ops import sampling as op
from tests.support.kernels import Kernels, cases

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

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


def make_rows(count: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, **extra):
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
        drawn=heat.nonzero()[:, 0],
        max_top_k=top_k,
        any_top_p=top_p < 1.0,
        **extra,
    )


@cases((), product(VOCABS, [torch.float32, torch.bfloat16]))
def test_greedy_takes_the_first_of_the_largest(kernels: Kernels, case):
    vocab, dtype = case
    logits = torch.randn(9, vocab).mul(2).round().to(dtype)  # full of ties
    assert torch.equal(kernels(op.sample, logits).tokens, op.sample(logits).tokens)


# Short of one program's tile, on its edge, and cut into parts; with filters for which few candidates tell enough.
@cases(product([5, 1024, 3001], ["plain", "all"]), product(VOCABS, SETTINGS))
def test_draws_are_those_of_the_cpu(kernels: Kernels, case):
    vocab, name = case
    for scale in (0.1, 3.0, 30.0):
        logits = torch.randn(24, vocab) * scale
        rows = make_rows(24, **SETTINGS[name])
        assert torch.equal(kernels(op.sample, logits, rows).tokens, op.sample(logits, rows).tokens)


@cases([torch.float32], [torch.bfloat16])
def test_what_candidates_do_not_tell_is_settled(kernels: Kernels, case):
    logits = torch.cat([torch.randn(3, 3001) * scale for scale in (0.1, 30.0)]).to(case)
    rows = make_rows(6, top_p=0.9, logprob_rows=torch.tensor([1, 4]), num_logprobs=2)
    ahead = kernels(op.sample_ahead, logits, rows)
    # Rows 0 and 3 are greedy; in rows 1 and 2 two thousand tokens are nearly alike.
    assert (ahead.tokens == op.UNDECIDED).tolist() == [False, True, True, False, False, False]
    expected = op.sample(logits, rows)
    settled = kernels(op.settle, ahead, logits, rows)
    assert torch.equal(settled.tokens, expected.tokens)
    torch.testing.assert_close(settled.logprobs.chosen, expected.logprobs.chosen, rtol=1e-5, atol=1e-5)


@cases(["draw"])
def test_rows_that_are_not_drawn_do_not_matter(kernels: Kernels, case):
    logits = torch.randn(9, 1000)
    rows = make_rows(9)
    picked = torch.tensor([7, 1])
    found = kernels(op.draw, logits, logits.amax(-1), rows, picked)
    assert torch.equal(found, op.sample(logits, rows).tokens[picked])


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
def test_bias_penalties_and_logprobs_are_the_same(kernels: Kernels, case):
    vocab = case
    logits = torch.randn(6, vocab) * 3
    rows = make_rows(
        6,
        bias=op.Bias(
            rows=torch.tensor([0, 0, 2]), tokens=torch.tensor([1, 1, 7]), values=torch.tensor([9.0, 9.0, -1.0])
        ),
        penalties=op.Penalties(
            rows=torch.tensor([0, 1, 1, 4]),
            tokens=torch.tensor([3, 3, 4, 5]),
            counts=torch.tensor([2.0, 0.0, 1.0, 3.0]),
            repetition=torch.full((6,), 1.3),
            presence=torch.full((6,), 0.5),
            frequency=torch.full((6,), 0.1),
        ),
        logprob_rows=torch.tensor([0, 3, 4]),
        num_logprobs=5,
    )
    torch.testing.assert_close(kernels(op.edit_logits, logits, rows), op.edit_logits(logits, rows))
    found, expected = kernels(op.sample, logits, rows), op.sample(logits, rows)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.logprobs.top_tokens, expected.logprobs.top_tokens)
    torch.testing.assert_close(found.logprobs.top, expected.logprobs.top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logprobs.chosen, expected.logprobs.chosen, rtol=1e-5, atol=1e-5)


@cases(product([math.nan, math.inf, -math.inf], [5, 4096]))
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's word for what is meant to happen
def test_a_row_that_holds_no_numbers_fails_alone(kernels: Kernels, case):
    bad, vocab = case
    logits = torch.randn(4, vocab)
    logits[1, slice(None) if bad == -math.inf else vocab // 2] = bad
    for rows in (None, make_rows(4)):
        found = kernels(op.sample, logits, rows).tokens
        assert torch.equal(found, op.sample(logits, rows).tokens)
        assert int(found[1]) == -1
