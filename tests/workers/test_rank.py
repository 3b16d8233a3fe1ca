"""What a rank settles before it imports anything heavy, and how it times its start."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.addresses import cache_dir
from headrace.workers import rank
from headrace.workers.config import EngineConfig
from headrace.workers.group import GroupSpec
from headrace.workers.parallel_compile import Ahead
from headrace.workers.start_report import Phase, StartClock


def test_kernels_are_kept_with_the_models(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "so that it is gone afterwards")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    rank.keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == str(cache_dir() / "triton")


def test_a_folder_that_a_person_named_stays(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    rank.keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


class Engine:
    """Warms up in the phases that it is given."""

    def __init__(self, *phases):
        self._phases = phases

    def warm_up(self, told):
        for phase in self._phases:
            told(phase)

    def load_gauges(self):
        return {"graphs": 11}


def test_warming_up_is_timed_phase_by_phase():
    def phases_of(*told, times):
        ticking = iter(times)
        clock = StartClock(0.0, clock=lambda: next(ticking))
        rank._warm_up(Engine(*told), clock)
        return [(phase.name, phase.seconds, phase.amount) for phase in clock.report().phases]

    assert phases_of("graphs", "kernels", times=(2.0, 5.0)) == [("graphs", 2.0, 11), ("kernels", 3.0, 0)]
    assert phases_of("kernels", times=(2.0,)) == [("kernels", 2.0, 0)]


def test_what_was_compiled_ahead_is_a_phase_of_its_own(monkeypatch):
    monkeypatch.setattr(rank, "compiled_ahead", lambda: Ahead(seconds=1.5, kernels=60, threads=4))
    clock = StartClock(0.0, clock=lambda: 2.0)
    rank._warm_up(Engine("kernels"), clock)
    assert clock.report().phases == (
        Phase(name="compile", seconds=1.5, amount=60, threads=4),
        Phase(name="kernels", seconds=0.5),
    )


def test_what_was_compiled_while_weights_came_is_told_apart(monkeypatch):
    """Of the weights remains what was waited for."""
    monkeypatch.setattr(rank, "compiled_ahead", lambda: Ahead(seconds=6.0, kernels=60, threads=16))
    monkeypatch.setattr(rank, "_imported", lambda path: load)
    times = iter((3.0, 4.0, 11.0, 13.0))
    clock = StartClock(0.0, clock=lambda: next(times))

    def load(folder, config, *, name, progress):
        progress(0, 100)
        progress(50, 100)
        progress(100, 100)
        return SimpleNamespace(kv_tokens=512)

    group = GroupSpec(name="g", folder=Path("m"), model_name="m", config=EngineConfig())
    said = []
    launcher = SimpleNamespace(send=lambda kind, **fields: said.append((kind, fields.get("done"))))
    rank._load(group, launcher, clock)
    assert [(phase.name, phase.seconds) for phase in clock.report().phases] == [
        ("imports", 3.0),
        ("model", 1.0),
        ("compile", 6.0),
        ("weights", 1.0),
        ("memory", 2.0),
    ]
    assert (said[0], said[-1]) == (("loading", 0), ("loading", 100))


def test_imports_are_not_looked_through_by_the_collector():
    """Nor what they made, later; and other things are."""
    gc.unfreeze()
    try:
        with rank._uncollected():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000
        with pytest.raises(ValueError, match="no such module"), rank._uncollected():
            raise ValueError("no such module")
        assert gc.isenabled()
    finally:
        gc.unfreeze()
