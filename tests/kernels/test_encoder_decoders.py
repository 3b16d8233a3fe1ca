"""Encoder-decoders against transformers on the same random weights: many sources in one batch, decoded in chunks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headrace.kernels.kv import KVCache
from headrace.kernels.ops.relative import relative_bias
from headrace.kernels.spec import RelativeBias
from headrace.workers.loader import load_model
from tests.support.batches import make_batch
from tests.support.tiny_models import T5_VARIANTS, save_t5

BLOCK = 8


@pytest.fixture(scope="module", params=list(T5_VARIANTS))
def pair(request, tmp_path_factory):
    """A model of transformers and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_t5(folder, request.param), folder


def texts(*lens: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 101, (length,), generator=generator).tolist() for length in lens]


@torch.inference_mode()
def test_logits_are_those_of_transformers(pair):
    reference, folder = pair
    sources, targets = texts(30, 1, 9, seed=1), texts(1, 25, 12, seed=2)
    expected = [
        reference(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
        for source, target in zip(sources, targets, strict=True)
    ]
    model = load_model(folder)
    cache = KVCache(model.spec, 64, BLOCK, torch.float32, "cpu")
    # Rows 0 to 2 of the blocks hold the targets' keys and values, rows 4 to 6 those of the sources.
    whole = [(len(source), len(source)) for source in sources]
    flat = [token for source in sources for token in source]
    model.encode(make_batch(whole, rows=[4, 5, 6], token_ids=flat, block_size=BLOCK), cache)

    found: list[list[torch.Tensor]] = [[], [], []]
    for lens in ({0: (1, 1), 1: (20, 20), 2: (5, 5)}, {1: (4, 24), 2: (6, 11)}, {1: (1, 25), 2: (1, 12)}):
        tokens = [token for row, (count, total) in lens.items() for token in targets[row][total - count : total]]
        batch = make_batch(list(lens.values()), rows=list(lens), token_ids=tokens, all_logits=True, block_size=BLOCK)
        contexts = [(count, max(count, len(sources[row]))) for row, (count, _) in lens.items()]
        cross = make_batch(contexts, rows=[4 + row for row in lens], block_size=BLOCK)
        own = tuple(len(sources[row]) for row in lens)
        cross = dataclasses.replace(cross, context_lens=torch.tensor(own, dtype=torch.int32), context_lens_host=own)
        logits = model(dataclasses.replace(batch, cross=cross), cache)
        for row, part in zip(lens, logits.split([count for count, _ in lens.values()]), strict=True):
            found[row].append(part)
    for wanted, parts in zip(expected, found, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-4 * scale)
        assert len(wanted) == 1 or wanted.std(0).mean() > 0.05 * scale


@pytest.mark.parametrize("both_directions", [True, False])
def test_buckets_are_those_of_transformers(both_directions):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 301)
    spec = RelativeBias(num_buckets=32, max_distance=128)
    expected = T5Attention._relative_position_bucket(distances, both_directions, 32, 128)
    table = torch.arange(32.0)[:, None]
    assert torch.equal(relative_bias(table, distances, spec, both_directions=both_directions)[0].long(), expected)
