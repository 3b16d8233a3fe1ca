"""Every family's logits against transformers on the same random weights, loaded from the same files."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels import model as model_module
from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from headrace.workers.loader import load_model
from tests.support.batches import make_batch
from tests.support.parity import MARGIN, narrowed, root_mean_square
from tests.support.tiny_models import FAMILIES, save_model

BLOCK = 8


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    """A model of transformers and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(folder, request.param), folder


def logits_of(
    model: Model, cache: KVCache, texts: list[list[int]], lens: dict[int, tuple[int, int]]
) -> dict[int, torch.Tensor]:
    """All logits of one step by sequence; `lens` are (tokens of this step, tokens with them)."""
    tokens = [token for row, (count, total) in lens.items() for token in texts[row][total - count : total]]
    batch = make_batch(
        list(lens.values()), rows=list(lens), block_size=BLOCK, num_blocks=64, token_ids=tokens, all_logits=True
    )
    parts = model(batch, cache).split([count for count, _ in lens.values()])
    return dict(zip(lens, parts, strict=True))


@torch.inference_mode()
def test_float32_logits_are_those_of_transformers(pair):
    reference, folder = pair
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in (1, 50, 33, 8)]
    expected = [reference(torch.tensor([text])).logits[0] for text in texts]
    model = load_model(folder, dtype="float32")
    cache = KVCache(model.spec, 64, BLOCK, torch.float32, "cpu")

    whole = logits_of(model, cache, texts, {row: (len(text), len(text)) for row, text in enumerate(texts)})
    # The same again in three steps: the cache must carry what the step does not compute. Decodes come first.
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    for lens in ({0: (1, 1), 1: (20, 20), 2: (5, 5), 3: (8, 8)}, {1: (29, 49), 2: (27, 32)}, {1: (1, 50), 2: (1, 33)}):
        for row, part in logits_of(model, cache, texts, lens).items():
            parts[row].append(part)
    for text, wanted, at_once, chunked in zip(texts, expected, whole.values(), parts, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(at_once, wanted, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(torch.cat(chunked), wanted, rtol=0, atol=1e-4 * scale)
        if len(text) > 1:
            assert wanted.std(0).mean() > 0.05 * scale, "the model says the same whatever it is told"


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_as_near_to_float32_as_those_of_transformers(pair, dtype):
    reference, folder = pair
    text = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    exact = reference(torch.tensor([text])).logits[0]
    theirs = narrowed(reference, dtype)(torch.tensor([text])).logits[0].float() - exact
    model = load_model(folder, dtype=str(dtype).removeprefix("torch."))
    cache = KVCache(model.spec, 64, BLOCK, dtype, "cpu")
    ours = logits_of(model, cache, [text], {0: (60, 60)})[0].float() - exact
    assert root_mean_square(ours, model) < MARGIN * root_mean_square(theirs, model)


@torch.inference_mode()
def test_positions_that_nobody_reserved_are_made_when_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "_FIRST_POSITIONS", 8)
    reference = save_model(tmp_path, "llama", max_position_embeddings=40)
    model = load_model(tmp_path, dtype="float32")
    cache = KVCache(model.spec, 64, BLOCK, torch.float32, "cpu")
    text = list(range(40))
    parts, sizes = [], []
    for count, total in ((5, 5), (6, 11), (29, 40)):
        parts.append(logits_of(model, cache, [text], {0: (count, total)})[0])
        sizes += [len(table) for table in model._tables.values()]
    wanted = reference(torch.tensor([text])).logits[0]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert sizes == [10, 22, 40]
    model.reserve_positions(20)
    assert len(next(iter(model._tables.values()))) == 40
