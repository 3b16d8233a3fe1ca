"""Encoders against transformers on the same random weights: hidden states, masks filled, pooled texts."""

from __future__ import annotations

import pytest
import torch

from headrace.workers.loader import load_model
from tests.support.batches import make_batch
from tests.support.tiny_encoders import ENCODERS, save_encoder

TEXTS = (5, 1, 31, 12)


@pytest.fixture(scope="module", params=list(ENCODERS))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save_encoder(folder, request.param), folder


@torch.inference_mode()
def test_a_ragged_batch_is_what_transformers_makes_of_each_text(pair):
    reference, folder = pair
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 101, (length,), generator=generator).tolist() for length in TEXTS]
    model = load_model(folder)
    batch = make_batch(
        [(length, length) for length in TEXTS], token_ids=[token for text in texts for token in text], block_size=8
    )
    hidden = model.hidden(batch, None)
    for text, states in zip(texts, hidden.split(TEXTS), strict=True):
        expected = reference(torch.tensor([text]), output_hidden_states=True)
        torch.testing.assert_close(states, expected.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
        if model.spec.head is not None:
            torch.testing.assert_close(model.logits(states), expected.logits[0], rtol=1e-4, atol=2e-4)
        else:
            torch.testing.assert_close(model.pooled(states[:1]), expected.pooler_output, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_segments_are_told_apart(pair):
    reference, folder = pair
    kinds = reference.config.type_vocab_size
    types = torch.tensor([index % kinds for index in range(9)])
    batch = make_batch([(9, 9)], token_ids=list(range(2, 11)), block_size=8, token_types=types)
    found = load_model(folder).hidden(batch, None)
    expected = reference(batch.token_ids[None], token_type_ids=types[None], output_hidden_states=True)
    torch.testing.assert_close(found, expected.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
