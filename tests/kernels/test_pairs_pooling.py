"""The kernel of `pool` against its reference, and that against the sums of each text."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from headrace.kernels.ops.pooling import pool
from tests.support.kernels import Kernels, cases

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Texts on both sides of a program's rows; without any state, between others and at the end.
LENS = {"one": (7,), "many": (1, 64, 65, 2, 200), "empty": (3, 0, 70, 0, 0)}


def make(dtype: torch.dtype, lens: tuple[int, ...], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.tensor(lens).cumsum(0)
    return torch.randn(sum(lens), size).add(3).to(dtype), torch.cat((torch.zeros(1), ends)).int()


@cases(
    [*product(DTYPES, ["many"], [40]), *product(DTYPES[:1], LENS, [1, 72])],
    product(DTYPES, LENS, [384, 768, 1024, 1000]),
)
def test_pool(kernels: Kernels, case):
    dtype, name, size = case
    states, starts = make(dtype, LENS[name], size)
    found = kernels(pool, states, starts)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, pool(states, starts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LENS)
def test_the_mean_and_the_first(name):
    states, starts = make(torch.float32, LENS[name], 5)
    means, firsts = pool(states, starts)
    for text, mean, first in zip(torch.split(states, LENS[name]), means, firsts, strict=True):
        expected = (text.mean(0), text[0]) if len(text) else (torch.zeros(5), torch.zeros(5))
        torch.testing.assert_close((mean, first), expected)


@cases(["many"])
def test_what_is_not_a_number_stays_in_its_text(kernels: Kernels, case):
    states, starts = make(torch.float16, LENS[case], 24)
    spoilt = states.clone()
    spoilt[starts[1] : starts[2]] = torch.nan
    found = kernels(pool, spoilt, starts)
    assert found[:, 1].isnan().all()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(found[:, others], kernels(pool, states, starts)[:, others], rtol=0, atol=0)
