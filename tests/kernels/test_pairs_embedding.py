"""The kernel of `embed` against its reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from headrace.kernels.ops.embedding import embed
from tests.kernels.test_pairs import DTYPES, check, wide
from tests.support.kernels import Kernels, cases


@pytest.fixture
def kernels(request) -> Kernels:
    return Kernels(request.param)


def make(dtype: torch.dtype, count: int, size: int, added: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments: tables of 50 tokens, 20 positions and 3 segments."""
    given: dict[str, Any] = {}
    if "scale" in added:
        given["scale"] = 2.5
    if "positions" in added:
        given |= {"positions": torch.randint(0, 18, (count,)), "position_table": torch.randn(20, size).to(dtype)}
        given["offset"] = 2
    if "segment" in added:
        given["segment_table"] = torch.randn(3, size).to(dtype)
    if "segments" in added:
        given["segments"] = torch.randint(0, 3, (count,))
    return (torch.randint(0, 50, (count,)), torch.randn(50, size).to(dtype)), given


# One value, sizes of GPT-2 XL and Falcon, more than one program's; no tokens, one and some.
@cases(
    [*product(DTYPES, [1, 5], [40, 1100], ["", "scale-positions-segments"]), (torch.float32, 0, 8, "positions")],
    [*product(DTYPES, [300], [1, 1600, 4544], ["scale", "positions", "first-segment", "positions-segments"])],
)
def test_embed(kernels: Kernels, case):
    (token_ids, tokens), given = make(*case)
    expected = embed(token_ids, tokens.float(), **{name: wide(value) for name, value in given.items()})
    check(kernels(embed, token_ids, tokens, **given), expected, tokens.dtype)


@cases(["token", "position"])
def test_what_is_in_no_table_is_not_a_number(kernels: Kernels, case):
    (token_ids, tokens), given = make(torch.float32, 4, 40, "positions")
    expected = kernels(embed, token_ids, tokens, **given)
    (token_ids if case == "token" else given["positions"])[2] = 50
    (token_ids if case == "token" else given["positions"])[3] = -3
    found = kernels(embed, token_ids, tokens, **given)
    assert found[2:].isnan().all()
    assert torch.equal(found[:2], expected[:2])


def test_it_begins_when_all_before_it_is_done():
    """Attention reads lengths, tables and old keys before it waits: no launch that may overlap with the one before it
    is allowed here (`chain_triton`)."""
    from headrace.kernels.ops import embedding_triton, norm_triton

    assert "CHAINED" in norm_triton._norm.arg_names
    assert "CHAINED" not in embedding_triton._embed.arg_names
    assert "chained" not in vars(embedding_triton)
