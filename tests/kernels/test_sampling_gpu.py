"""The sampling op on a GPU chooses as it does on the CPU, whose choices are tested against the plain rules."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.kernels.ops import sampling as op
from tests.support.kernels import Kernels

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("kernels", ["cuda"], indirect=True)]

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_takes_the_first_of_the_largest(kernels: Kernels, vocab, dtype):
    logits = torch.randn(9, vocab).mul(2).round().to(dtype)  # full of ties
    assert torch.equal(kernels(op.sample, logits).tokens, op.sample(logits).tokens)


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_are_those_of_the_cpu(kernels: Kernels, vocab, name):
    for scale in (0.1, 3.0, 30.0):
        logits = torch.randn(24, vocab) * scale
        rows = make_rows(24, **SETTINGS[name])
        assert torch.equal(kernels(op.sample, logits, rows).tokens, op.sample(logits, rows).tokens)


def test_the_generators_words_are_the_same(kernels: Kernels):
    counter = tuple(torch.randint(0, 2**32, (1000,)) for _ in range(4))
    key = tuple(torch.randint(0, 2**32, (1000,)) for _ in range(2))
    for found, expected in zip(kernels(op.philox, counter, key), op.philox(counter, key), strict=True):
        assert torch.equal(found, expected)


def test_noise_is_bounded_and_finite_for_every_word(kernels: Kernels):
    words = torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    noise = kernels(op.noise_of, words)
    torch.testing.assert_close(noise, op.noise_of(words), rtol=1e-5, atol=1e-5)
    assert float(noise.max()) <= op.MAX_NOISE


def test_bias_penalties_and_logprobs_are_the_same(kernels: Kernels):
    vocab = 20_001
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("vocab", [5, 4096])
def test_a_row_that_holds_no_numbers_fails_alone(kernels: Kernels, bad, vocab):
    logits = torch.randn(4, vocab)
    logits[1, vocab // 2] = bad
    for rows in (None, make_rows(4)):
        found = kernels(op.sample, logits, rows).tokens
        assert torch.equal(found, op.sample(logits, rows).tokens)
        assert int(found[1]) == -1
