"""What is rehearsed before the weights are there is what is launched once they are."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from headrace.kernels.model import Model
from headrace.workers import ahead, engines, runner
from headrace.workers.ahead import Rehearsed, rehearse
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.config import EngineConfig
from headrace.workers.describe import describe
from headrace.workers.engine import Engine
from headrace.workers.estimate import estimated
from headrace.workers.kv_size import expected_len, with_measured_cache
from headrace.workers.loader import load_model
from headrace.workers.memory import GpuMemory
from headrace.workers.runner import Runner
from headrace.workers.served import start_token_of
from tests.support.launches import noted_launches
from tests.support.mixed_load import MIXED_LOAD_CONFIG
from tests.support.tiny_models import save_model, save_t5
from tests.workers.test_rehearsal import Graphs, Texts
from tests.workers.test_warmup import missing

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="notes what the interpreter would launch"
)
MEMORY = GpuMemory(total=1 << 40, held=0, utilization=0.9)
CONFIG = EngineConfig(**MIXED_LOAD_CONFIG | {"kv_tokens": None})


@pytest.fixture(autouse=True)
def _as_a_gpu(monkeypatch):
    """A CPU whose steps become graphs, and whose memory is measured."""
    monkeypatch.setattr(Runner, "on_gpu", True)
    monkeypatch.setattr(runner, "StepGraphs", Graphs)
    monkeypatch.setattr(runner, "TextGraphs", Texts)
    monkeypatch.setattr(Model, "pack", lambda model: None)  # matrices as a GPU has them
    monkeypatch.setattr("headrace.workers.kv_size.gpu_memory", lambda device, utilization: MEMORY)
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


class Served:
    """A model folder, loaded."""

    def __init__(self, folder, family):
        (save_t5 if family == "t5" else save_model)(folder, family)
        self.checkpoint = Checkpoint(folder)
        self.card = describe(self.checkpoint)[0]
        self.model = load_model(self.checkpoint)
        self.start = start_token_of(self.model.spec, self.card, None)

    def rehearse(self, config=CONFIG):
        return rehearse(self.model, self.card, config, MEMORY, start_token=self.start)

    def start_up(self, config, **rehearsed):
        self.model.fold()  # as it is once the weights are there
        sized = with_measured_cache(self.model, self.card, config, MEMORY, start_token=self.start, compiled=True)
        engine = Engine(self.model, self.card, sized.config, start_token=self.start, **rehearsed)
        engine.warm_up()
        return engine


def compiling(monkeypatch, found):
    """Each time something is to be compiled ahead: do it or not, and say how many kernels there were."""
    monkeypatch.setattr(runner, "compile_ahead", found)


@interpreted
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("gpt2", {}), ("t5", {}), ("llama", {"max_num_seqs": 2, "max_batch_tokens": 40})],
)
def test_it_compiles_all_that_a_start_launches(tmp_path, monkeypatch, family, settings):
    """Also where texts may be longer than the cache of a rehearsal."""
    served, config = Served(tmp_path, family), dataclasses.replace(CONFIG, **settings)
    compiling(monkeypatch, lambda compute, device: compute() or 1)
    with noted_launches(computed=False) as found:
        rehearsed = served.rehearse(config)
    assert rehearsed.sizing
    again = []
    compiling(monkeypatch, lambda compute, device: again.append(compute) or 0)
    with noted_launches() as made:
        engine = served.start_up(config, rehearsed=rehearsed.max_model_len)
    assert engine.card.max_model_len == rehearsed.max_model_len
    assert not again
    assert len(made) > 5
    assert not missing(made, found)
    assert not missing(found, made)


def test_another_length_of_texts_is_rehearsed_again(tmp_path, monkeypatch):
    served = Served(tmp_path, "llama")
    monkeypatch.setattr(Engine, "_compute_examples", lambda engine, everything: None)
    monkeypatch.setattr(Runner, "capture", lambda runner: None)
    for length, expected in ((None, 1), (7, 1), (served.card.max_model_len, 0)):
        asked = []
        compiling(monkeypatch, lambda compute, device, asked=asked: asked.append(compute) or 0)
        served.start_up(CONFIG, rehearsed=length)
        assert len(asked) == expected


def test_a_cache_that_a_person_sized_is_not_measured(tmp_path, monkeypatch):
    served = Served(tmp_path, "llama")
    asked = []
    compiling(monkeypatch, lambda compute, device: asked.append(compute) or 0)
    assert served.rehearse(dataclasses.replace(CONFIG, kv_tokens=100)) == Rehearsed(max_model_len=96)
    assert len(asked) == 1


def test_where_room_is_short_only_the_dry_run_is_rehearsed(tmp_path, monkeypatch):
    served = Served(tmp_path, "llama")
    asked = []
    compiling(monkeypatch, lambda compute, device: asked.append(compute) or 0)
    monkeypatch.setattr(ahead, "expected_len", lambda *args: None)
    assert served.rehearse() == Rehearsed(sizing=True)
    assert len(asked) == 1


def test_the_length_is_known_where_there_is_room_and_more(tmp_path):
    served = Served(tmp_path, "llama")
    spec, length = served.model.spec, served.card.max_model_len

    def expected(total, **settings):
        memory, config = GpuMemory(total=total, held=0, utilization=0.9), dataclasses.replace(CONFIG, **settings)
        return expected_len(served.card, config, memory, estimated(spec, served.card, config, torch.float32))

    assert expected(1 << 40) == length
    assert expected(1 << 40, max_num_seqs=1) == length
    assert expected(1 << 20) is None
    assert expected(1 << 20, kv_tokens=10**6) == length


def test_without_memory_all_is_left_for_later(tmp_path, monkeypatch):
    served = Served(tmp_path, "llama")

    def fail(compute, device):
        raise torch.OutOfMemoryError("no memory")

    compiling(monkeypatch, fail)
    assert served.rehearse() == Rehearsed()


def test_who_reads_the_weights_keeps_room(tmp_path, monkeypatch):
    """Or its thread would find no memory where there is enough for one after the other."""
    served = Served(tmp_path, "llama")
    compiling(monkeypatch, lambda compute, device: pytest.fail("it was rehearsed"))
    memory = GpuMemory(total=3 << 30, held=0, utilization=0.9)
    assert rehearse(served.model, served.card, CONFIG, memory, start_token=None) == Rehearsed()


def test_it_happens_while_weights_are_read(tmp_path, monkeypatch):
    """And what is served afterwards has them."""
    save_model(tmp_path, "llama")
    seen = []

    def watch(model, card, config, memory, *, start_token):
        seen.append(start_token)
        return Rehearsed(sizing=True, max_model_len=card.max_model_len)

    monkeypatch.setattr(engines, "check_before_loading", lambda *args: MEMORY)
    monkeypatch.setattr(engines, "rehearse", watch)
    engine = engines.load_engine(tmp_path, CONFIG)
    assert seen == [None]
    assert engine._rehearsed == engine.card.max_model_len
    expected = dict(load_model(tmp_path).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in engine._runner.model.named_parameters())


def test_what_fails_there_ends_the_reading(tmp_path, monkeypatch):
    save_model(tmp_path, "llama")

    def fail(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(engines, "check_before_loading", lambda *args: MEMORY)
    monkeypatch.setattr(engines, "rehearse", fail)
    with pytest.raises(RuntimeError, match="no such instruction"):
        engines.load_engine(tmp_path, CONFIG)
