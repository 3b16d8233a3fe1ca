"""The table of a start as a person sees it."""

from __future__ import annotations

from headrace.scripts.groups import Groups
from headrace.scripts.phases import Phases
from headrace.scripts.start_table import start_table
from headrace.scripts.terminal import Terminal
from headrace.workers.group import GroupEvent
from headrace.workers.start_report import Phase, StartReport


def report(*phases):
    return StartReport(tuple(Phase(name=name, seconds=seconds, amount=amount) for name, seconds, amount in phases))


def test_phases_with_what_was_counted_and_the_sum():
    lines = start_table(
        report(
            ("imports", 3.14, 0),
            ("model", 0.5, 0),
            ("weights", 2.0, 16_060_522_496),
            ("memory", 0.81, 849_312),
            ("kernels", 1.2, 0),
            ("graphs", 1.96, 11),
            ("broker", 0.04, 0),
        )
    )
    assert lines == [
        "  python and imports      3.1 s",
        "  config and device       0.5 s",
        "  reading weights         2.0 s  16.1 GB",
        "  sizing the cache        0.8 s  849,312 tokens",
        "  warming up              1.2 s",
        "  CUDA graphs             2.0 s  11",
        "  connecting              0.0 s",
        "  ready after             9.7 s",
    ]


def test_kernels_with_the_threads_that_compiled_them():
    def line(amount, threads):
        return start_table(StartReport((Phase(name="compile", seconds=4.21, amount=amount, threads=threads),)))[0]

    assert line(78, 16) == "  compiling kernels       4.2 s  78 by 16 threads"
    assert line(0, 0) == "  compiling kernels       4.2 s"


def test_the_widest_line_fits_a_terminal():
    lines = start_table(report(("x" * 20, 99_999.9, 10**12), ("weights", 99_999.9, 10**14), ("memory", 0.0, 10**10)))
    assert max(map(len, lines)) < 80


def test_of_several_groups_the_slowest_is_shown(capsys):
    terminal = Terminal()
    groups = Groups(("a", "b", "c"), terminal, Phases(terminal))
    for name, seconds in (("a", 3.0), ("b", 5.0), ("c", 4.0)):
        start = report(("imports", seconds, 0))
        groups.take(GroupEvent(group=name, kind="ready", text="ready", start=start))
    assert groups.slowest == report(("imports", 5.0, 0))
    groups.take(GroupEvent(group="a", kind="ready", text="ready: serves m", start=report(("imports", 7.0, 0))))
    assert "a: ready: serves m, after 7.0 s" in capsys.readouterr().err
