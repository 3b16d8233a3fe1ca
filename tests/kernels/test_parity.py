"""Every family's logits against transformers on the same random weights, loaded from the same files.

Each family is run in float32 and bfloat16, and its texts in all the ways in which an engine or a caller may have them
computed. In float32 logits are those of transformers; in bfloat16 they are as near to float32 as those of transformers
in bfloat16 are. The greedy tokens of the same ways are compared in tests/workers/test_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from headrace.kernels import model as model_module
from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from headrace.workers.inference.padded import PaddedModel
from headrace.workers.inference.replays import Replays
from headrace.workers.inference.road import Road
from headrace.workers.inference.watch import Watch
from headrace.workers.loader import load_model
from tests.support.batches import make_batch
from tests.support.parity import at_once, at_random, check, in_steps, logits_of, narrowed, their_logits
from tests.support.tiny_models import FAMILIES, save_model

BLOCK = 8
VOCAB = 250  # of the texts; the models know some more tokens
DECODES = 6


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    """A model of transformers and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(folder, request.param), folder


def on_cpu(model: Model, *args):
    return model(*args)


def whole(model: Model, texts: list[list[int]]) -> list[torch.Tensor]:
    return logits_of(model, on_cpu, texts, at_once([len(text) for text in texts]))


def chunked(model: Model, texts: list[list[int]]) -> list[torch.Tensor]:
    """In two chunks and then single tokens; the first text has one token and is a decode beside the others."""
    return logits_of(model, on_cpu, texts, in_steps([len(text) for text in texts], DECODES))


def token_by_token(model: Model, texts: list[list[int]]) -> list[torch.Tensor]:
    """Prompts of one token, and then one token after the other."""
    longest = len(texts[0])
    steps = [dict.fromkeys(range(len(texts)), (1, total)) for total in range(1, longest + 1)]
    return logits_of(model, on_cpu, texts, steps)


def resumed(model: Model, texts: list[list[int]]) -> list[torch.Tensor]:
    """Half of every text, then, as after a preemption, all of that anew and two more chunks."""
    halves = [len(text) // 2 for text in texts]
    again = {row: (half, half) for row, half in enumerate(halves)}
    rests = {
        row: (len(text) - half - 1, len(text) - 1) for row, (text, half) in enumerate(zip(texts, halves, strict=True))
    }
    last = {row: (1, len(text)) for row, text in enumerate(texts)}
    found = logits_of(model, on_cpu, texts, [again, again, rests, last])
    for half, logits in zip(halves, found, strict=True):
        torch.testing.assert_close(logits[half : 2 * half], logits[:half])
    return [logits[half:] for half, logits in zip(halves, found, strict=True)]


def left_padded(model: Model, texts: list[list[int]]) -> list[torch.Tensor]:
    """As a rectangle with a mask, which is how the library's callers have them."""
    columns = max(map(len, texts)) + 2
    ids = torch.tensor([[0] * (columns - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (columns - len(text)) + [1] * len(text) for text in texts])
    road = Road(False, torch.device("cpu"), Watch(model))
    padded = PaddedModel(model, Replays(model, max_tokens=128, road=road), max_tokens=128)
    logits = padded.logits(ids, mask, None, padded.new_cache(), 0)
    assert not logits[mask == 0].any()
    return [row[-len(text) :].float() for row, text in zip(logits, texts, strict=True)]


# How texts of these lengths are computed.
WAYS: dict[str, tuple[tuple[int, ...], Callable[[Model, list[list[int]]], list[torch.Tensor]]]] = {
    "single": ((60,), whole),
    "ragged": ((1, 50, 33, 8), whole),
    "left-padded": ((40, 17, 1, 8), left_padded),
    "one-token prompt": ((14, 14, 14, 14), token_by_token),
    "chunked": ((1, 50, 33, 12), chunked),
    "resumed": ((50, 33, 8), resumed),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_logits_are_those_of_transformers(pair, dtype, way):
    reference, folder = pair
    lens, compute = WAYS[way]
    texts = at_random(*lens, vocab=VOCAB)
    ask = their_logits(texts)
    theirs = None if dtype == torch.float32 else ask(narrowed(reference, dtype))
    model = load_model(folder, dtype=str(dtype).removeprefix("torch."))
    check(compute(model, texts), ask(reference), theirs, model)


@torch.inference_mode()
def test_float16_logits_are_as_near_to_float32_as_those_of_transformers(pair):
    reference, folder = pair
    texts = at_random(60, vocab=VOCAB, seed=3)
    ask = their_logits(texts)
    model = load_model(folder, dtype="float16")
    check(whole(model, texts), ask(reference), ask(narrowed(reference, torch.float16)), model)


@torch.inference_mode()
def test_positions_that_nobody_reserved_are_made_when_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "_FIRST_POSITIONS", 8)
    reference = save_model(tmp_path, "llama", max_position_embeddings=40)
    model = load_model(tmp_path, dtype="float32")
    cache = KVCache(model.spec, 64, BLOCK, torch.float32, "cpu")
    text = list(range(40))
    parts, sizes = [], []
    for count, total in ((5, 5), (6, 11), (29, 40)):
        batch = make_batch([(count, total)], block_size=BLOCK, num_blocks=64, token_ids=text[total - count : total])
        parts.append(model.logits(model.hidden(batch, cache)))
        sizes += [len(table) for table in model._tables.values()]
    wanted = reference(torch.tensor([text])).logits[0]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert sizes == [10, 22, 40]
    model.reserve_positions(20)
    assert len(next(iter(model._tables.values()))) == 40
