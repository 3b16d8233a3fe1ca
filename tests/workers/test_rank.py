"""What a rank settles before it imports anything heavy, and how it times its start."""

from __future__ import annotations

import os

from headrace.addresses import cache_dir
from headrace.workers import rank
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
