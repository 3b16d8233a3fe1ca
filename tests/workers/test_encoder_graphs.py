"""Texts at fixed addresses: the results of the engine as it is, whatever fills a batch up.

Here a batch is computed as a graph computes it, by the kernels, which Triton interprets; that it can be captured is for
a GPU to show.
"""

from __future__ import annotations

import pytest
import torch

from headrace.workers import rank
from headrace.workers.encoder_engine import EncoderEngine
from headrace.workers.encoder_graphs import StaticTexts, TextGraphs, sizes_of_batches
from headrace.workers.encoder_runner import EncoderRunner
from headrace.workers.start_report import StartClock
from tests.support.kernels import Kernels
from tests.support.static_steps import InterpretedTexts
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_tokenizer import CLS, MASK, SEP
from tests.workers.test_encoder_engine import TEXTS, ask, floats, load, run

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def with_static_texts(engine: EncoderEngine) -> EncoderEngine:
    Kernels("interpreted")  # skips where kernels are compiled
    runner = engine._runner
    step = StaticTexts(
        runner._computed,
        max_tokens=runner._max_tokens,
        max_texts=runner._max_texts,
        max_model_len=runner._max_model_len,
        device=runner._device,
    )
    runner._graphs = InterpretedTexts(step, sizes_of_batches(runner._max_tokens, runner._max_texts))
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_encoder(folder, "bert")
    return folder


# One text and many, with masks and without; a batch that is full to the last token; texts that are longer together
# than any may be alone, so that what fills a batch up is too.
BATCHES = {
    "one": [TEXTS[0]],
    "all": [*TEXTS],
    "full": [[CLS, *range(3, 17), SEP]],
    "short": [[CLS, SEP]] * 9,
    "long": [[CLS, *range(3, 40), SEP], [CLS, 9, MASK, SEP]],
}


def results(engine: EncoderEngine, texts):
    """Vectors of all texts, and words for the masks of those that have some."""
    asked = [ask(n, text) for n, text in enumerate(texts)]
    asked += [ask(100 + n, text, "fill_mask", sampling={"logprobs": 2}) for n, text in enumerate(texts) if MASK in text]
    runs, _, refusals = run(engine, *asked)
    assert not refusals
    return runs


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for number, wanted in expected.items():
        if number < 100:
            torch.testing.assert_close(floats(found[number].tokens), floats(wanted.tokens), rtol=1e-4, atol=1e-5)
        else:
            assert found[number].tokens == wanted.tokens


@pytest.mark.parametrize("name", BATCHES)
def test_results_are_those_of_the_engine_without(folder, name):
    settings = {"device": "cpu", "max_batch_tokens": 128, "max_num_seqs": 12}
    expected = results(load(folder, **settings), BATCHES[name])
    engine = with_static_texts(load(folder, **settings))
    for _ in range(2):  # what was left of another batch does no harm
        assert_same(results(engine, BATCHES[name]), expected)
        results(engine, TEXTS[::-1])
    assert engine.load_gauges()["graph_replays"] == engine.steps > 0


def test_batches_larger_than_any_graph_are_computed_without(folder, monkeypatch):
    monkeypatch.setattr("headrace.workers.encoder_graphs._TOKENS", (16,))
    engine = with_static_texts(load(folder, device="cpu"))
    expected = results(load(folder, device="cpu"), TEXTS)
    assert_same(results(engine, TEXTS), expected)
    assert engine.load_gauges()["graph_replays"] == 0


def test_without_room_for_graphs_texts_are_read_without(folder, monkeypatch, caplog):
    engine = load(folder, device="cpu")

    def no_room(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(EncoderRunner, "on_gpu", True)
    monkeypatch.setattr(TextGraphs, "capture", no_room)
    engine.warm_up()
    assert "no memory for CUDA graphs (CUDA out of memory" in caplog.text
    assert 0 in results(engine, TEXTS)
    assert engine.load_gauges()["graph_replays"] == 0


def test_how_many_there_are_is_told_when_it_starts_and_as_long_as_it_runs(folder, monkeypatch):
    """A group said that it had captured graphs, but not how many; so none that came later could be seen."""
    engine = load(folder, device="cpu", max_batch_tokens=128, max_num_seqs=12)
    monkeypatch.setattr(EncoderRunner, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr("headrace.workers.encoder_graphs.captured", lambda compute, pool: (None, ()))
    clock = StartClock()
    assert engine.load_gauges()["graphs"] == 0
    rank._warm_up(engine, clock)
    count = len(sizes_of_batches(128, 12))
    assert engine.load_gauges()["graphs"] == count > 3
    assert {phase.name: phase.amount for phase in clock.report().phases}["graphs"] == count


def test_as_many_masks_as_a_step_can_have_are_computed_before_it_is_ready(folder, monkeypatch):
    """One mask was; a second one had its kernels compiled when it came. And 400 at once had no bound of memory."""
    engine = load(folder, device="cpu", cuda_graphs=False, max_batch_tokens=400, max_num_seqs=12)
    monkeypatch.setattr(EncoderRunner, "on_gpu", True)
    model, rows = engine._runner._model, []
    monkeypatch.setattr(model, "logits", lambda x, compute=model.logits: rows.append(len(x)) or compute(x))
    engine.warm_up()
    assert set(rows) == {1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256}
    rows.clear()
    for number in range(11):
        engine.add(ask(number, [MASK] * 36, "fill_mask", sampling={"logprobs": 2}), 0.0)
    together = engine.step(0.0).runs
    assert rows == [256, 140]
    engine.add(ask(0, [MASK] * 36, "fill_mask", sampling={"logprobs": 2}), 0.0)
    [alone] = engine.step(0.0).runs
    for one in together:  # of which some have their masks in both pieces
        assert one.tokens == alone.tokens
        assert [pair[0] for pair in one.logprobs] == pytest.approx([pair[0] for pair in alone.logprobs], abs=1e-4)


def test_graphs_can_be_switched_off(folder, monkeypatch):
    engine = load(folder, device="cpu", cuda_graphs=False)
    monkeypatch.setattr(EncoderRunner, "on_gpu", True)
    engine.warm_up()
    assert engine._runner._graphs is None


@pytest.mark.parametrize(
    ("tokens", "texts", "sizes"),
    [
        (16, 1, [(16, 1)]),
        (40, 64, [(16, 1), (16, 8), (32, 1), (32, 8), (40, 1), (40, 8)]),
        (20, 4, [(16, 1), (16, 4), (20, 1), (20, 4)]),
    ],
)
def test_sizes(tokens, texts, sizes):
    assert sizes_of_batches(tokens, texts) == sizes


def test_no_graph_is_larger_than_its_launches_are_worth():
    sizes = sizes_of_batches(100_000, 64)
    assert sizes[-1] == (2048, 64)
    assert sizes == sorted(set(sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BATCHES)
def test_graphs_give_the_same(folder, name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    settings = {"max_batch_tokens": 128, "max_num_seqs": 12}
    expected = results(load(folder, device="cpu", **settings), BATCHES[name])
    engine = load(folder, device="cuda", **settings)
    engine.warm_up()
    for _ in range(2):
        assert_same(results(engine, BATCHES[name]), expected)
        results(engine, TEXTS[::-1])
    assert engine.load_gauges()["graph_replays"] == engine.steps > 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_a_pass_is_two_copies_around_a_graph(folder, texts):
    """What pools used to be a dozen launches of their own, and the copies to be three and of pageable memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    engine = load(folder, device="cuda", max_batch_tokens=128, max_num_seqs=12)
    engine.warm_up()
    run(engine, ask(0, TEXTS[0]))
    for number, text in enumerate(texts):
        engine.add(ask(number, text), 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = engine.step(0.0).runs
            assert [len(launched), len(engine.step(0.0).runs)] == [0, len(texts)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    calls = {event.key: event.count for event in profile.key_averages()}
    assert (calls["cudaGraphLaunch"], calls["cudaMemcpyAsync"]) == (1, 2)
    assert not [name for name in calls if "LaunchKernel" in name]
