"""Encoder-decoders against transformers on the same random weights: many sources in one batch, decoded in chunks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headrace.errors import UnsupportedModelError
from headrace.kernels.kv import KVCache
from headrace.kernels.ops.relative import relative_bias
from headrace.kernels.spec import RelativeBias
from headrace.workers.engine import Engine, EngineConfig
from headrace.workers.loader import load_model
from tests.support.batches import make_batch
from tests.support.tiny_tokenizer import tiny_tokenizer_json

BLOCK = 8

# v1.0; v1.1 and Flan, whose outputs are not scaled, with more layers on one side and inner size unlike the hidden one.
VARIANTS = {
    "t5": {"feed_forward_proj": "relu"},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    "t5-deep-encoder": {"feed_forward_proj": "gated-silu", "num_layers": 4, "num_decoder_layers": 2},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tmp_path_factory):
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {"num_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    config = T5Config(
        vocab_size=101,
        d_model=40,
        d_kv=12,
        d_ff=56,
        num_heads=5,
        decoder_start_token_id=0,
        **settings | VARIANTS[request.param],
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
            elif "relative" in name:
                parameter.normal_(std=1.0)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer_json())
    return model, folder


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


def test_serving_one_is_refused_until_it_is_possible(pair):
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        Engine.load(pair[1], EngineConfig())
