"""Of the last block's tokens only those go past its attention whose states are wanted; the cache gets all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from tests.support.batches import make_batch
from tests.support.real_sizes import injected
from tests.support.tiny_models import FAMILIES, make_model

LENS = [(1, 6), (9, 9), (5, 7)]  # a decode, a prompt, and a part of one behind another
CHOICES = {"ends": [0, 9, 14], "one": [4], "none": [], "all": list(range(15)), "in disorder": [14, 0, 7, 7]}


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request) -> Model:
    return injected(make_model(request.param), torch.float32, torch.device("cpu"))


def states(model: Model, rows: list[int] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last hidden states, by default of all tokens, and what is in the cache."""
    batch = make_batch(LENS, token_ids=list(range(5, 20)))
    cache = KVCache(model.spec, 64, batch.block_size, torch.float32, "cpu")
    tensors = [part for index in range(len(model.blocks)) for part in cache.layer(index)]
    for tensor in tensors:
        tensor.copy_(torch.linspace(-1, 1, tensor.numel()).view(tensor.shape))
    with torch.inference_mode():
        found = model.hidden(batch, cache, None if rows is None else torch.tensor(rows, dtype=torch.int64))
    return found, tensors


@pytest.mark.parametrize("choice", CHOICES)
def test_states_are_those_of_all_tokens(model, choice):
    rows = CHOICES[choice]
    whole, meant = states(model, None)
    found, cached = states(model, rows)
    assert found.shape == (len(rows), model.spec.hidden_size)
    torch.testing.assert_close(found, whole[rows], rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    for one, other in zip(cached, meant, strict=True):
        assert torch.equal(one, other)


def test_feed_forward_of_the_last_block_reads_no_others(model):
    read: list[int] = []

    def note(_part: Any, given: tuple[torch.Tensor, ...]) -> None:
        read.append(len(given[0]))

    hooks = [block.mlp.register_forward_pre_hook(note) for block in model.blocks]
    states(model, [0, 14])
    assert read == [15] * (len(model.blocks) - 1) + [2]
    states(model, [])
    assert read[len(model.blocks) :] == [15] * (len(model.blocks) - 1)
    for hook in hooks:
        hook.remove()
