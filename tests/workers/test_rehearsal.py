"""Rehearsals: they launch what the steps will launch, no more and no less, and leave nothing behind."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch

from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from headrace.kernels.ops import pair
from headrace.workers import encoder_runner, runner
from headrace.workers.config import EngineConfig
from headrace.workers.encoder_graphs import TextGraphs
from headrace.workers.encoder_runner import EncoderRunner
from headrace.workers.engine import Engine
from headrace.workers.engines import load_engine
from headrace.workers.graphs import RehearsedGraphs
from headrace.workers.rehearsal import _enough, _Zeros, rehearsing
from headrace.workers.runner import Runner
from tests.support.launches import noted_launches
from tests.support.mixed_load import MIXED_LOAD_CONFIG
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import save_model, save_t5
from tests.workers.test_warmup import missing

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="notes what the interpreter would launch"
)


# The kernels of ops, before anybody notes what they launch.
_KERNEL = pair._kernel


class Graphs(RehearsedGraphs):
    """Graphs whose launches are noted; no reference could compute them, for of their texts only bounds are known."""

    def capture(self):
        with patch.object(pair, "_kernel", _KERNEL), _Zeros():
            super().capture()

    def _replay(self, kind, size):
        with patch.object(pair, "_kernel", _KERNEL), _Zeros():
            return super()._replay(kind, size)


@pytest.fixture(autouse=True)
def _as_a_gpu(monkeypatch):
    """A CPU whose steps become graphs."""
    monkeypatch.setattr(Runner, "on_gpu", True)
    monkeypatch.setattr(EncoderRunner, "on_gpu", True)
    monkeypatch.setattr(runner, "StepGraphs", Graphs)
    monkeypatch.setattr(TextGraphs, "capture", TextGraphs.rehearse)
    monkeypatch.setattr(Model, "pack", lambda model: None)  # matrices as a GPU has them


def save(folder, family):
    if family == "bert":
        save_encoder(folder, family)
    else:
        (save_t5 if family == "t5" else save_model)(folder, family)
    return load_engine(folder, EngineConfig(**MIXED_LOAD_CONFIG, device="cpu"))


def launched(engine, monkeypatch):
    """What is launched when it warms up, if nothing is compiled ahead."""
    for module in (runner, encoder_runner):
        monkeypatch.setattr(module, "compile_ahead", lambda rehearse, device: 0)
    with noted_launches() as noted:
        engine.warm_up()
    return noted


def rehearsed(engine, monkeypatch):
    """What would be compiled ahead."""
    for module in (runner, encoder_runner):
        monkeypatch.setattr(module, "compile_ahead", lambda rehearse, device: rehearse() or 1)
    with noted_launches(computed=False) as noted:
        if isinstance(engine, Engine):
            engine._compile_examples(True)
        else:
            engine._runner.compile_ahead(engine._rehearse)
    return noted


@interpreted
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "mixtral", "t5", "bert"])
def test_it_launches_what_the_steps_launch(tmp_path, monkeypatch, family):
    made = launched(save(tmp_path, family), monkeypatch)
    found = rehearsed(save(tmp_path, family), monkeypatch)
    assert len(made) > 5
    assert not missing(made, found)
    assert not missing(found, made)
