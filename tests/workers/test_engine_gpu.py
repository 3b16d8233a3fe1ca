"""The tests of the engine once more, with the model on a GPU, step by step and with graphs: the same tokens come."""

from __future__ import annotations

import pytest
import torch

from headrace.workers import engines
from tests.workers import test_engine
from tests.workers.test_engine import *  # noqa: F403  # the tests and their fixtures

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["eager", "graphs"])
def _on_the_gpu(request, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")

    def load(folder, config):
        engine = engines.load_engine(folder, config)
        assert next(engine._runner.model.parameters()).is_cuda
        if request.param == "graphs":
            engine.warm_up()
            assert engine._runner._graphs is not None
        return engine

    monkeypatch.setattr(test_engine, "load_engine", load)


def test_every_decode_is_a_replay(one, request):
    engine = test_engine.load(one[1])
    prompts = test_engine.PROMPTS
    test_engine.generate(engine, prompts, max_tokens=test_engine.STEPS)
    replays = engine.load_gauges()["graph_replays"]
    if "graphs" in request.node.name:
        assert replays >= test_engine.STEPS - 2
    else:
        assert replays == 0
