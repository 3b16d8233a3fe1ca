"""Rehearsals: they launch what the steps will launch, no more and no less, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import os
from itertools import islice
from unittest.mock import patch

import pytest
import torch

from headrace.kernels.model import Model
from headrace.kernels.ops import pair
from headrace.messages import unpack_tokens
from headrace.workers import encoder_runner, runner
from headrace.workers import engine as engine_module
from headrace.workers.config import EngineConfig
from headrace.workers.encoder_graphs import RehearsedTexts
from headrace.workers.encoder_runner import EncoderRunner
from headrace.workers.engine import Engine
from headrace.workers.engines import load_engine
from headrace.workers.parallel_compile import Ahead
from headrace.workers.rehearsal import _enough, _Zeros, rehearsing
from headrace.workers.runner import Runner
from headrace.workers.step_graphs import RehearsedGraphs
from headrace.workers.warmup import examples
from tests.support.engines import generate
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


class Texts(RehearsedTexts):
    """Likewise."""

    def capture(self, pool=None):
        with patch.object(pair, "_kernel", _KERNEL), _Zeros():
            super().capture(pool)

    def _computed(self, size):
        with patch.object(pair, "_kernel", _KERNEL), _Zeros():
            return super()._computed(size)


@pytest.fixture(autouse=True)
def _as_a_gpu(monkeypatch):
    """A CPU whose steps become graphs."""
    monkeypatch.setattr(Runner, "on_gpu", True)
    monkeypatch.setattr(EncoderRunner, "on_gpu", True)
    monkeypatch.setattr(runner, "StepGraphs", Graphs)
    for module in (runner, encoder_runner):
        monkeypatch.setattr(module, "TextGraphs", Texts)
    monkeypatch.setattr(Model, "pack", Model.fold)  # matrices as a GPU has them


def save(folder, family, **config):
    if family == "bert":
        save_encoder(folder, family)
    else:
        (save_t5 if family == "t5" else save_model)(folder, family)
    return load_engine(folder, EngineConfig(**MIXED_LOAD_CONFIG, device="cpu", **config))


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
            engine.compile_examples()
        else:
            engine._runner.compile_ahead(engine._rehearse)
    return noted


@interpreted
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "gptj", "mixtral", "t5", "bert"])
def test_it_launches_what_the_steps_launch(tmp_path, monkeypatch, family):
    made = launched(save(tmp_path, family), monkeypatch)
    found = rehearsed(save(tmp_path, family), monkeypatch)
    assert len(made) > 5
    assert not missing(made, found)
    assert not missing(found, made)


@interpreted
def test_so_it_does_without_graphs(tmp_path, monkeypatch):
    made = launched(save(tmp_path, "llama", cuda_graphs=False), monkeypatch)
    found = rehearsed(save(tmp_path, "llama", cuda_graphs=False), monkeypatch)
    assert len(made) > 5
    assert made == found


@interpreted
def test_it_leaves_nothing_behind(tmp_path, monkeypatch):
    """Texts that were rehearsed are not in the prefix cache, whose blocks nobody computed."""
    engine = save(tmp_path, "llama")
    stats = dataclasses.replace(engine._scheduler.stats)
    rehearsed(engine, monkeypatch)
    assert engine._runner._graphs is None
    assert len(engine._runner.model.blocks) == 3
    assert engine._scheduler.stats == stats
    assert not engine.has_work
    engine.validate()
    monkeypatch.setattr(Runner, "on_gpu", False)
    prompts = [list(unpack_tokens(stream.prompt)) for stream in _first_texts(engine, 5)]
    expected = generate(save(tmp_path, "llama", prefix_cache=False), prompts, max_tokens=3)
    assert generate(engine, prompts, max_tokens=3) == expected
    assert engine._scheduler.stats.prefix_hits == 0


def _first_texts(engine, count):
    """Those that are rehearsed, of a block and more."""
    streams = (stream for [stream, *_] in examples(engine.card, engine.config, sources=False, everything=True))
    return list(islice((stream for stream in streams if len(stream.prompt) > 4 * 20), count))


@pytest.mark.parametrize(
    ("sizing", "small", "expected"),
    [(0, 0, ["_compute_examples"]), (0, 9, ["_compute_examples", "_rehearse"]), (5, 9, ["_rehearse"])],
)
def test_where_an_earlier_start_kept_all_it_is_short(tmp_path, monkeypatch, sizing, small, expected):
    """Known from what sizing the cache, or else a small text, had to compile."""
    made = []

    def compile_ahead(rehearse, device):
        made.append(getattr(rehearse, "func", rehearse).__name__)
        return small

    monkeypatch.setattr(runner, "compile_ahead", compile_ahead)
    monkeypatch.setattr(engine_module, "compiled_ahead", lambda: Ahead(kernels=sizing))
    save(tmp_path, "llama").compile_examples()
    assert made == expected


def test_one_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    engine = save(tmp_path, "llama")
    scheduler, empty = engine._scheduler, torch.empty

    def fail(rehearse, device):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(runner, "compile_ahead", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.warm_up()
    assert engine._scheduler is scheduler
    assert len(engine._runner.model.blocks) == 3
    assert torch.empty is empty


def test_without_room_for_graphs_steps_are_rehearsed_without(tmp_path, monkeypatch):
    engine = save(tmp_path, "llama")

    def no_room(self):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(RehearsedGraphs, "capture", no_room)
    engine._runner.rehearse_capture()
    assert engine._runner._graphs is None


def test_memory_is_zero_and_otherwise_as_it_was_asked_for(tmp_path):
    model = save(tmp_path, "llama")._runner.model
    like = torch.ones(3, 2, dtype=torch.float64)
    with rehearsing(model):
        assert len(model.blocks) == 2
        made = (torch.empty((2, 3), dtype=torch.int32), torch.empty_like(like), like.new_empty(4, dtype=torch.bool))
    assert [(part.shape, part.dtype, bool(part.any())) for part in made] == [
        ((2, 3), torch.int32, False),
        ((3, 2), torch.float64, False),
        ((4,), torch.bool, False),
    ]
    assert len(model.blocks) == 3


@pytest.mark.parametrize(
    ("layers", "enough"),
    [("a", 1), ("aaaa", 2), ("abab", 4), ("ababab", 4), ("aaaab", 5), ("abca", 4), ("aab", 3), ("abbbba", 6)],
)
def test_each_kind_of_layer_and_one_more_and_the_last_one_last(layers, enough):
    assert _enough(tuple(layers)) == enough
