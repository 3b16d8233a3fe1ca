"""Where the time of a start went: measured by a clock, sent by a rank, whatever a rank sends."""

from __future__ import annotations

import math

import pytest

from headrace.workers.start_report import Phase, StartClock, StartReport


def clock_at(*times):
    ticking = iter(times)
    return lambda: next(ticking)


def test_phases_follow_each_other_without_a_gap():
    clock = StartClock(10.0, clock=clock_at(13.0, 13.5, 20.0))
    clock.end("imports")
    clock.end("model")
    clock.end("weights", 16_000)
    report = clock.report()
    assert report.phases == (
        Phase(name="imports", seconds=3.0),
        Phase(name="model", seconds=0.5),
        Phase(name="weights", seconds=6.5, amount=16_000),
    )
    assert report.seconds == 10.0
    assert str(report) == "imports 3.0 s, model 0.5 s, weights 6.5 s"


def test_without_a_launcher_it_begins_with_itself():
    clock = StartClock(clock=clock_at(5.0, 6.0))
    clock.end("imports")
    assert clock.report().seconds == 1.0


def test_what_phases_held_is_told_apart_and_in_one_place():
    """Compiling: three seconds of the first phase, and two of the third."""
    clock = StartClock(0.0, clock=clock_at(5.0, 6.0, 16.0))
    clock.within(Phase(name="compile", seconds=3.0, amount=20, threads=4))
    clock.end("memory", 100)
    clock.within(Phase(name="compile", seconds=3.0, amount=20, threads=4))
    clock.end("graphs")
    clock.within(Phase(name="compile", seconds=5.0, amount=50, threads=8))
    clock.end("kernels")
    assert clock.report().phases == (
        Phase(name="compile", seconds=5.0, amount=50, threads=8),
        Phase(name="memory", seconds=2.0, amount=100),
        Phase(name="graphs", seconds=1.0),
        Phase(name="kernels", seconds=8.0),
    )
    assert clock.report().seconds == 16.0


def test_where_nothing_was_compiled_there_is_no_such_phase():
    clock = StartClock(0.0, clock=clock_at(1.0))
    clock.within(Phase(name="compile", seconds=0.0))
    clock.end("kernels")
    assert clock.report().phases == (Phase(name="kernels", seconds=1.0),)


def test_a_report_crosses_the_pipe_as_it_is():
    report = StartReport((Phase(name="compile", seconds=1.5, amount=7, threads=2), Phase(name="graphs", seconds=0.25)))
    assert StartReport.from_wire({"kind": "warm", "phases": report.to_wire()}) == report
    longer = report.then(Phase(name="broker", seconds=1))
    assert (longer.seconds, report.seconds) == (2.75, 1.75)


@pytest.mark.parametrize(
    "phases",
    [
        *(None, 3, "weights", [3]),
        *([["a", "b", 1, 0]], [["a", 1.0, 1]], [[None, 1.0, 0, 0]], [["a", 1.0, 1, -1]], [["a", 1.0, 1, "2"]]),
        *([["a", value, 0, 0]] for value in (-1.0, math.inf, math.nan)),
        *([["a", 1.0, amount, 0]] for amount in (-1, 1.5)),
    ],
)
def test_what_is_no_phase_is_left_out(phases):
    assert StartReport.from_wire({"phases": phases}) == StartReport(())


def test_a_message_holds_no_more_than_a_screen():
    report = StartReport.from_wire({"phases": [["x" * 99, 1.0, 0, 0]] * 1000})
    assert len(report.phases) == 32
    assert {phase.name for phase in report.phases} == {"x" * 20}
