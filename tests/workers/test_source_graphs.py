"""Sources at fixed addresses: what an encoder-decoder reads as graphs do, whatever fills a batch up, is what it reads
without them.

Here a batch is computed as a graph computes it, by the kernels, which Triton interprets; that it can be captured is for
a GPU to show.
"""

from __future__ import annotations

import dataclasses
from array import array

import pytest
import torch

from headrace.kernels.ops.pair import kernels_on_cpu
from headrace.workers.batch import whole_texts
from headrace.workers.encoder_graphs import StaticTexts, TextGraphs, sizes_of_batches
from headrace.workers.engine import Engine, EngineConfig
from headrace.workers.engines import load_engine
from headrace.workers.estimate import estimated_graphs
from headrace.workers.memory import graph_bytes
from headrace.workers.runner import Runner
from headrace.workers.step_graphs import StepGraphs
from tests.support.engines import assign, generate, run
from tests.support.kernels import Kernels
from tests.support.static_steps import InterpretedSteps, InterpretedTexts
from tests.support.tiny_models import T5_VARIANTS, save_model, save_t5

# Triton 3.6 counts in its interpreter in a way that newer numpy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")

# Longer than the distance (20) from which on all are alike, and shorter; with blocks that are full and others.
SOURCES = [[5], list(range(60, 97)), [9, 9], list(range(40, 56))]


def load(folder, **config) -> Engine:
    settings = {"kv_tokens": 512, "block_size": 8, "dtype": "float32", "max_num_seqs": 4, "max_batch_tokens": 64}
    engine = load_engine(folder, EngineConfig(**settings | {"device": "cpu", "max_model_len": 64} | config))
    assert isinstance(engine, Engine)
    return engine


def with_static_sources(engine: Engine) -> Engine:
    Kernels("interpreted")  # skips where kernels are compiled
    runner = engine._runner
    sizes = sizes_of_batches(runner._max_batch_tokens, runner._num_rows)
    runner._source_graphs = InterpretedTexts(runner.static_sources(), sizes)
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder)
    return folder


@pytest.mark.parametrize("size", [(56, 4), (70, 4), (96, 9)])
def test_states_are_those_without(folder, size):
    """The bias of relative positions counts from each source's own beginning; what fills up biases nobody."""
    Kernels("interpreted")
    model = load(folder)._runner.model
    texts = [array("I", source) for source in SOURCES]
    lens = [len(text) for text in texts]
    expected = model.encoded(whole_texts(torch.tensor([token for text in texts for token in text]), lens))
    step = StaticTexts(
        lambda batch: (model.encoded(batch),), max_tokens=96, max_texts=9, max_model_len=64, device=torch.device("cpu")
    )
    for _ in range(2):  # what was left of another batch does no harm
        step.fill(texts, size)
        with kernels_on_cpu():
            (states,) = step.compute(size)
        torch.testing.assert_close(states[: sum(lens)], expected, rtol=1e-4, atol=1e-5)
        step.fill(texts[:2], (96, 4))


@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_are_those_of_the_engine_without(folder, ahead):
    expected = generate(load(folder), SOURCES, max_tokens=6)
    engine = with_static_sources(load(folder, async_scheduling=ahead))
    assert generate(engine, SOURCES, max_tokens=6) == expected
    assert engine._runner._source_graphs.replays == engine.load_gauges()["graph_replays"] == 1
    # Rows are used again, by sequences with other blocks.
    assert generate(engine, SOURCES[::-1], max_tokens=6) == expected[::-1]


def test_sources_of_preempted_sequences_are_read_again(folder):
    limits = {"kv_tokens": 96, "block_size": 4}
    expected = generate(load(folder, **limits), SOURCES, max_tokens=12)
    engine = with_static_sources(load(folder, **limits))
    assert generate(engine, SOURCES, max_tokens=12) == expected
    assert engine.load_gauges()["preemptions"] > 0
    assert engine._runner._source_graphs.replays > 1


def test_steps_and_sources_as_graphs_together(folder):
    expected = generate(load(folder, max_model_len=56), SOURCES, max_tokens=4)
    engine = with_static_sources(load(folder, max_model_len=56))
    engine._runner._graphs = InterpretedSteps(engine._runner.static_steps())
    assert generate(engine, SOURCES, max_tokens=4) == expected
    assert engine.load_gauges()["graph_replays"] == engine.steps + 1
    engine._runner.forget_replays()
    assert engine.load_gauges()["graph_replays"] == 0


def test_sources_larger_than_any_graph_are_read_without(folder):
    """A source may exceed the budget of a step, alone; those beside it, or after it, are read as ever."""
    expected = generate(load(folder), SOURCES, max_tokens=4)
    engine = with_static_sources(load(folder, max_batch_tokens=20))
    assert generate(engine, SOURCES, max_tokens=4) == expected
    assert engine._runner._source_graphs.replays == 2  # the first one alone, then the last two


def test_what_fills_a_batch_up_touches_nobody(folder):
    engine = with_static_sources(load(folder))
    kv = engine._runner.kv
    kv._tensor[:, :, : -kv.block_size] = 7.0
    run(engine, [assign(SOURCES[1], max_tokens=1)])
    keys, _ = kv.layer(0)
    touched = (keys != 7.0).flatten(1).any(1).nonzero().flatten()
    ours = touched[touched < engine.kv_tokens]
    assert len(ours) == len(SOURCES[1]) + 1  # and the one token that the answer begins with
    assert engine.kv_tokens in touched  # the spare one
    torch.testing.assert_close(keys[-kv.block_size :], torch.zeros_like(keys[-kv.block_size :]))


@pytest.mark.parametrize("kind", [StepGraphs, TextGraphs])
def test_without_room_only_those_graphs_are_left_out(folder, monkeypatch, caplog, kind):
    def no_room(self, *pool):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    for each in (StepGraphs, TextGraphs):
        monkeypatch.setattr(each, "capture", no_room if each is kind else lambda self, *pool: None)
    runner = load(folder)._runner
    runner.capture()
    assert "no memory for CUDA graphs (CUDA out of memory" in caplog.text
    assert ("steps are computed without" in caplog.text) is (kind is StepGraphs)
    assert ("sources are computed without" in caplog.text) is (kind is TextGraphs)
    assert (runner._graphs is None) is (kind is StepGraphs)
    assert (runner._source_graphs is None) is (kind is TextGraphs)


def test_steps_and_sources_share_their_memory(folder, monkeypatch):
    pools = []
    monkeypatch.setattr(StepGraphs, "capture", lambda self: setattr(self, "pool", "of steps"))
    monkeypatch.setattr(TextGraphs, "capture", lambda self, pool: pools.append(pool))
    load(folder)._runner.capture()
    assert pools == ["of steps"]


def test_graphs_can_be_switched_off(folder, monkeypatch):
    monkeypatch.setattr(Runner, "on_gpu", True)
    monkeypatch.setattr(Runner, "capture", lambda self: pytest.fail("it captures"))
    engine = load(folder, cuda_graphs=False)
    engine.warm_up()
    assert engine.load_gauges()["graphs"] == 0


def test_their_memory_is_counted(folder):
    """The description of each; their workspace is that of the steps, and there are no logits to keep."""
    spec = load(folder)._runner.model.spec
    config = EngineConfig(max_num_seqs=4, max_batch_tokens=64)
    decodes, sources = [1, 2, 4], [0] * len(sizes_of_batches(64, 4))
    assert len(sources) == 6  # 16, 32 and 64 tokens of one source, and of up to four
    kept = [rows * spec.vocab_size * 4 for rows in decodes + sources]
    counted = {"dtype": torch.float32, "tokens": 64, "step": 5}
    assert estimated_graphs(spec, config, **counted) == graph_bytes(kept, step=5)
    assert estimated_graphs(spec, dataclasses.replace(config, cuda_graphs=False), **counted) == 0


def test_a_decoder_has_none(tmp_path, monkeypatch):
    save_model(tmp_path)
    monkeypatch.setattr(StepGraphs, "capture", lambda self: None)
    monkeypatch.setattr(TextGraphs, "capture", lambda self, pool: pytest.fail("it captures"))
    load(tmp_path)._runner.capture()


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", T5_VARIANTS)
def test_graphs_give_the_same_and_nothing_is_left_to_do(tmp_path, name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    save_t5(tmp_path, name)
    # The longest source is larger than any graph, and comes alone.
    sources = [*SOURCES, [(7 * place) % 250 for place in range(100)], *([number, 3] for number in range(20))]
    settings = {"device": "cuda", "max_num_seqs": 12, "max_model_len": 160, "kv_tokens": 4096}
    eager = load(tmp_path, **settings, cuda_graphs=False)
    eager.warm_up()
    assert eager._runner._source_graphs is None
    expected = generate(eager, sources, max_tokens=8)
    engine = load(tmp_path, **settings)
    engine.warm_up()
    graphs = engine._runner._source_graphs
    assert len(graphs) == len(graphs.sizes) == len(sizes_of_batches(64, 12))
    assert graphs.replays == 0, "those of warming up do not count"
    ready = engine.load_gauges()
    for _ in range(2):
        assert generate(engine, sources, max_tokens=8) == expected
    after = engine.load_gauges()
    assert graphs.replays > 2
    assert after["graph_replays"] > graphs.replays
    assert after["compilations"] == 0
    assert after["graphs"] == ready["graphs"] > len(graphs)
