"""Logits are edited, and tokens counted, on a GPU or interpreted as on the CPU (which test_token_state.py tests)."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.ops.edits import EditTables, count, edit
from tests.support.kernels import Kernels, cases, to_device

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def make_tables(vocab: int, *, seen: bool = True) -> EditTables:
    """Four rows: one wants nothing, one all, one penalties, one a long list of biases."""
    penalties = torch.tensor([[1.0, 0.0, 0.0], [1.3, 0.5, 0.1], [0.8, -0.5, 0.3], [1.0, 0.0, 0.0]])
    sizes = torch.tensor([0, min(9, vocab), 0, min(600, vocab)])
    return EditTables(
        penalties=penalties if seen else penalties[:1].repeat(4, 1),
        seen=torch.randint(0, 7, (4, vocab), dtype=torch.int32) if seen else None,
        biased=torch.stack([torch.randperm(vocab)[:600] for _ in range(4)]).int(),
        biases=torch.randn(4, min(600, vocab)) * 10,
        limits=torch.stack((sizes // 3, sizes, torch.tensor([0, 5, 0, 10])), 1),
    )


@cases(
    [(5, torch.float32, True), (2050, torch.bfloat16, True), (2050, torch.float16, False)],
    [(151_936, torch.bfloat16, True), (50_257, torch.float16, True), (50_257, torch.float32, False)],
)
def test_logits_are_edited_as_on_the_cpu(kernels: Kernels, case):
    vocab, dtype, seen = case
    tables = make_tables(vocab, seen=seen)
    logits = (torch.randn(5, vocab) * 3).to(dtype)
    rows, positions = torch.tensor([1, 3, 0, 2, 3]), torch.tensor([4, 9, 0, 100, 10])
    found = kernels(edit, logits, tables, rows, positions)
    assert torch.equal(found, edit(logits, tables, rows, positions))


@cases(["count"])
def test_tokens_are_counted_as_on_the_cpu(kernels: Kernels, case):
    tables = make_tables(50)
    tokens, rows = torch.tensor([7, -1, 0]), torch.tensor([2, 0, 3])
    expected = tables.seen.clone()
    expected[2, 7] += 2
    expected[3, 0] += 2
    on_device = to_device(tables, kernels.device)
    kernels(count, tokens, on_device, rows)
    assert torch.equal(on_device.seen.cpu(), expected)
