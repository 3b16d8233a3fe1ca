"""The kernel that places decodes against its reference."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.ops.placement import EXPECTED, Placed, place
from tests.support.kernels import Kernels, cases


@pytest.fixture
def kernels(request) -> Kernels:
    return Kernels(request.param)


@cases(
    [(1, 1, 1), (3, 5, 16), (7, 3, 5), (4, 1500, 16)],
    [(64, 8192, 16), (256, 70, 32)],
)
def test_place(kernels: Kernels, case):
    count, width, block_size = case
    generator = torch.Generator().manual_seed(count)
    tables = torch.randint(0, 2**31 - 1, (count + 2, width), generator=generator, dtype=torch.int32)
    rows = torch.randperm(count + 2, generator=generator)[:count]
    positions = torch.randint(0, width * block_size, (count,), generator=generator)
    tokens = torch.randint(0, 300_000, (count,), generator=generator)
    tokens[::2] = EXPECTED
    last_tokens = torch.randint(0, 300_000, (count + 2,), generator=generator)
    args = (tokens, positions, rows, tables, last_tokens, block_size)
    expected = place(*args)
    assert EXPECTED not in expected.token_ids
    for name, one, other in zip(Placed._fields, kernels(place, *args), expected, strict=True):
        assert one.dtype is other.dtype, name
        assert torch.equal(one, other), name


@cases(["nobody"])
def test_nobody_is_placed(kernels: Kernels, case):
    nobody = torch.empty(0, dtype=torch.int64)
    tables = torch.zeros((1, 2), dtype=torch.int32)
    placed = kernels(place, nobody, nobody, nobody, tables, torch.zeros(1, dtype=torch.int64), 4)
    assert [len(part) for part in placed] == [0, 0, 0, 0]
