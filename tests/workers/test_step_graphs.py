"""Graphs while an engine warms up: each is replayed once, layers are few, and nobody finds what was left out."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.model import Model
from headrace.messages import unpack_tokens
from headrace.workers import runner
from headrace.workers.config import EngineConfig
from headrace.workers.engine import Engine
from headrace.workers.engines import load_engine
from headrace.workers.graphs import Computed
from headrace.workers.rehearsal import few_layers
from headrace.workers.runner import Runner
from headrace.workers.step_graphs import StepGraphs
from headrace.workers.warmup import examples
from tests.support.engines import assign, generate, run
from tests.support.tiny_models import save_model


class Graph:
    """Of a step of some size; counts its replays. What it computes lies where that of others did, as on a GPU."""

    def __init__(self, rows, vocab, others):
        self.replays = 0
        self.computed = Computed(torch.zeros(rows, vocab), torch.ones(rows, dtype=torch.int64))
        self._others = others

    def replay(self):
        self.replays += 1
        for graph, _ in self._others:
            graph.computed.tokens.fill_(1 << 40)
        self.computed.tokens.fill_(1)


@pytest.fixture
def captured(monkeypatch):
    """The graphs of an engine on a CPU that claims to be a GPU, by the layers with which each was prepared."""
    made = []

    def capture(graphs):
        for kind in graphs._kinds:
            for size in kind.sizes:
                with graphs._prepared():
                    layers = len(kind._standing.model.blocks)
                graph = Graph(kind._standing.num_rows, kind._standing.model.spec.vocab_size, made)
                graphs._graphs[kind, size] = (graph, graph.computed)
                made.append((graph, layers))

    monkeypatch.setattr(Runner, "on_gpu", True)
    monkeypatch.setattr(StepGraphs, "capture", capture)
    monkeypatch.setattr(runner, "compile_ahead", lambda rehearse, device: 0)
    return made


@pytest.fixture
def engine(tmp_path):
    save_model(tmp_path, "llama", num_hidden_layers=4)
    settings = {"kv_tokens": 2048, "max_num_seqs": 20, "max_batch_tokens": 64, "device": "cpu"}
    made = load_engine(tmp_path, EngineConfig(**settings))
    assert isinstance(made, Engine)
    return made


def test_each_is_replayed_once_and_prepared_with_few_layers(engine, captured):
    engine.warm_up()
    assert len(captured) == engine.load_gauges()["graphs"] > 5
    assert {graph.replays for graph, _ in captured} == {1}
    assert {layers for _, layers in captured} == {2}


def test_afterwards_they_are_replayed_each_time_and_layers_are_all_there(engine, captured):
    engine.warm_up()
    model = engine._runner.model
    assert len(model.blocks) == 4
    before = sum(graph.replays for graph, _ in captured)
    generate(engine, [[5, 6, 7]], max_tokens=6)
    assert sum(graph.replays for graph, _ in captured) >= before + 6
    assert engine.load_gauges()["graph_replays"] >= 6


def test_no_text_finds_what_was_not_computed(engine, captured):
    """All that warming up leaves in the prefix cache would be wrong."""
    served = engine._scheduler
    engine.warm_up()
    assert engine._scheduler is served
    for [stream, *_] in examples(engine.card, engine.config, sources=False, everything=True):
        if len(stream.prompt) > 4 * 20:  # a block and more
            run(engine, [assign(list(unpack_tokens(stream.prompt)), max_tokens=2)])
    assert served.stats.prefix_queries > 0
    assert served.stats.prefix_hits == 0


def test_layers_that_fail_come_back(engine):
    model = engine._runner.model
    assert isinstance(model, Model)
    with pytest.raises(RuntimeError, match="mid-way"), few_layers(model):
        raise RuntimeError("mid-way")
    assert len(model.blocks) == 4
