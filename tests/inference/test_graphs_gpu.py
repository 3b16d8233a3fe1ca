"""CUDA graphs of the library as they are: captured and replayed, with the tokens of steps without, and then gone."""

from __future__ import annotations

import copy

import pytest
import torch

from headrace.errors import ConfigError
from headrace.kernels.model import Model
from headrace.workers.inference import init_inference
from tests.inference.batches import generated_at_once, padded
from tests.support.gpu_memory import check_that_nothing_stays
from tests.support.tiny_encoders import make_any
from tests.support.tiny_models import FAMILIES, make_model
from tests.support.tiny_tokenizer import END_OF_TEXT

pytestmark = pytest.mark.gpu

COUNT = 20  # tokens of an answer, which is more than a block
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": END_OF_TEXT, "max_new_tokens": COUNT}
PROMPTS = [[5, 60, 7], [200], list(range(40, 70)), [9] * 16]


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


def engines(name, *settings):
    """Of the same weights, one for each setting of cuda_graphs."""
    reference = make_any(name)
    return [init_inference(copy.deepcopy(reference), dtype="float32", cuda_graphs=setting) for setting in settings]


def batch(*lens):
    ids, mask = padded([*lens])
    return ids.cuda(), mask.cuda()


def replays(engine):
    return engine._kind.replays.num_replays


def road(engine, call="generate"):
    return engine.report().graphs[call]


@pytest.mark.parametrize("name", [*FAMILIES, "t5"])
def test_texts_are_those_without(name):
    plain, engine = engines(name, False, True)
    for lens in ([7], [11, 30, 1], [5] * 9):
        before = replays(engine)
        expected = plain.generate(*batch(*lens), **GREEDY)
        assert torch.equal(engine.generate(*batch(*lens), **GREEDY), expected)
        assert replays(engine) - before == (COUNT if name == "t5" else COUNT - 1)
    assert road(plain) == "without: cuda_graphs is False"
    settings = {"max_tokens": COUNT, "ignore_eos": True, "seed": 3}
    for temperature in (0.0, 1.0):
        expected = plain.generate_many(PROMPTS, **settings, temperature=temperature)
        assert engine.generate_many(PROMPTS, **settings, temperature=temperature) == expected
    assert plain._streams.gauges()["graph_replays"] == 0
    assert engine._streams.gauges()["graph_replays"] >= 2 * (COUNT - 3)
    for one in (plain, engine):
        one.destroy()


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "top_p": 0.9},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"prefill_chunk_size": 7},
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_ways_of_choosing(name, arguments):
    if name == "t5" and "prefill_chunk_size" in arguments:
        pytest.skip("sources are read in one piece")
    texts = []
    for engine in engines(name, False, None):
        torch.manual_seed(11)
        texts.append(engine.generate(*batch(12, 30), **GREEDY | arguments))
    assert torch.equal(*texts)
    assert replays(engine) >= COUNT - 1


def test_they_stay_between_calls_and_grow_with_them():
    (engine,) = engines("llama", None)
    assert road(engine) == "captured when first needed"
    for _ in range(3):
        engine.generate(*batch(11, 30, 1), **GREEDY)
    assert road(engine) == f"1 captured, {3 * (COUNT - 1)} steps replayed"
    engine.generate(*batch(4), **GREEDY)
    assert road(engine).startswith("2 captured")
    (plain,) = engines("llama", False)
    long = GREEDY | {"max_new_tokens": 400}
    assert torch.equal(engine.generate(*batch(20, 3), **long), plain.generate(*batch(20, 3), **long))


def test_their_memory_is_free_after_destroy():
    def use():
        engine = init_inference(make_model("llama", hidden_size=768, intermediate_size=3072))
        out = engine.generate(*batch(11, 30), **GREEDY, return_dict_in_generate=True)
        stream = engine.stream([5, 6], max_tokens=COUNT, ignore_eos=True, temperature=0.0)
        assert len(list(stream)) == COUNT
        assert engine._kind.replays.num_graphs == engine._streams.gauges()["graphs"] == 1
        engine.destroy()
        assert len(out.sequences) == 2  # kept, with its cache, until the engine is gone

    check_that_nothing_stays(use)


def test_hooks_are_called_and_graphs_come_back():
    plain, engine = engines("gpt2", False, None)
    expected, calls = plain.generate(*batch(9, 4), **GREEDY), []
    with engine.module.blocks[1].register_forward_hook(lambda *args: calls.append(1)):
        assert torch.equal(engine.generate(*batch(9, 4), **GREEDY), expected)
        assert road(engine) == "without: they would leave out a hook on blocks.1"
        assert len(calls) == COUNT
        engine.generate_many(PROMPTS[:1], max_tokens=COUNT, ignore_eos=True)
        assert len(calls) >= 2 * COUNT
    assert torch.equal(engine.generate(*batch(9, 4), **GREEDY), expected)
    assert replays(engine) == COUNT - 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_change_under_them(name):
    """Those of GPT-2 are also in sums, by which its norms are taken after the product."""
    plain, engine = engines(name, False, True)
    engine.generate(*batch(9, 4), **GREEDY)
    engine.generate_many(PROMPTS, max_tokens=COUNT, temperature=0.0, ignore_eos=True)
    other = init_inference(make_model(name, seed=9), dtype="float32", cuda_graphs=False)
    assert not torch.equal(other.generate(*batch(9, 4), **GREEDY), plain.generate(*batch(9, 4), **GREEDY))
    for assign in (False, True):  # in place, and in their place
        engine.module.load_state_dict(copy.deepcopy(other.module.state_dict()), assign=assign)
        assert torch.equal(engine.generate(*batch(9, 4), **GREEDY), other.generate(*batch(9, 4), **GREEDY))
        settings = {"max_tokens": COUNT, "temperature": 0.0, "ignore_eos": True}
        assert engine.generate_many(PROMPTS, **settings) == other.generate_many(PROMPTS, **settings)
        other = init_inference(make_model(name, seed=10), dtype="float32", cuda_graphs=False)


def test_what_cannot_be_captured_is_computed_without(monkeypatch):
    """And it breaks nothing: what can be is captured afterwards."""
    plain, engine, insisting, later = engines("llama", False, None, True, True)
    expected = plain.generate(*batch(9, 4), **GREEDY)
    logits = Model.logits
    with monkeypatch.context() as patch:
        patch.setattr(Model, "logits", lambda self, x: logits(self, x) + x.sum().item() * 0)
        assert torch.equal(engine.generate(*batch(9, 4), **GREEDY), expected)
        assert road(engine).startswith("without: the model cannot be captured (")
        with pytest.raises(ConfigError, match="cannot use any: the model cannot be captured"):
            insisting.generate(*batch(9, 4), **GREEDY)
    assert torch.equal(later.generate(*batch(9, 4), **GREEDY), expected)
    assert replays(later) == COUNT - 1


def test_no_graphs_for_cpus():
    with pytest.raises(ConfigError, match="goes to 'cpu', which has none"):
        init_inference(make_model("llama"), device="cpu", cuda_graphs=True)


def test_several_threads():
    """One captures while others compute."""
    plain, engine = engines("llama", False, None)
    batches = [batch(*lens) for lens in ([7], [11, 30], [3] * 5)]
    found = generated_at_once(engine, batches, 5, GREEDY)
    for one, each in zip(batches, found, strict=True):
        expected = plain.generate(*one, **GREEDY)
        assert all(torch.equal(text, expected) for text in each)
    assert replays(engine)


def test_in_inference_mode_and_out_of_it():
    """What is made in that mode can be written to there alone."""
    plain, engine = engines("llama", False, None)
    expected = plain.generate(*batch(9, 4), **GREEDY)
    with torch.inference_mode():
        assert torch.equal(engine.generate(*batch(9, 4), **GREEDY), expected)
        first = engine.generate_many(PROMPTS, max_tokens=COUNT, temperature=0.0)
    assert torch.equal(engine.generate(*batch(9, 4), **GREEDY), expected)
    assert engine.generate_many(PROMPTS, max_tokens=COUNT, temperature=0.0) == first
