"""How progress is drawn: one line redrawn on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import io
import threading

import pytest

from headrace.scripts.progress import ProgressLine

MB = 1_000_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_terminal_sees_one_line_per_phase_with_a_bar(clock: Clock) -> None:
    terminal = Terminal()
    with ProgressLine(terminal, clock=clock) as progress:
        for second in range(11):
            clock.now = 100.0 + second
            progress("downloading", second * 40 * MB, 400 * MB)
        progress("converting", 0, 10 * MB)
    lines = terminal.getvalue().split("\n")
    assert len(lines) == 3
    assert lines[2] == ""
    pictures = lines[0].split("\r\033[K")
    assert pictures[5] == "  downloading  [########............]   40%  160 of 400 MB  40 MB/s  6 s left"
    assert pictures[-1] == "  downloading  400 MB  10 s"


def test_a_terminal_is_not_drawn_on_too_often(clock: Clock) -> None:
    terminal = Terminal()
    with ProgressLine(terminal, clock=clock) as progress:
        for number in range(1000):
            progress("working", number, 1000)
    assert terminal.getvalue().count("\r") == 2  # the first picture, and the last


def test_a_long_line_does_not_wrap_while_it_is_redrawn(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    progress = ProgressLine(terminal, clock=clock)
    progress("x" * 100, 0, None)
    assert len(terminal.getvalue().removeprefix("\r\033[K")) == 19
    progress.close()
    assert "x" * 100 in terminal.getvalue()  # once it stays it is shown whole


def test_elsewhere_a_line_comes_every_few_seconds(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressLine(log, clock=clock) as progress:
        for second in range(13):
            clock.now = 100.0 + second
            progress("downloading", second * 10 * MB, 120 * MB)
        progress("converting", 0, 10 * MB)
    assert log.getvalue().splitlines() == [
        "  downloading    0%  0 of 120 MB",
        "  downloading   42%  50 of 120 MB  10 MB/s  7 s left",
        "  downloading   83%  100 of 120 MB  10 MB/s  2 s left",
        "  downloading  120 MB  12 s",
        "  converting    0%  0 of 10 MB",
    ]


def test_a_remark_is_shown_once(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressLine(log, clock=clock) as progress:
        progress("waiting for process 7", 0, None)
        progress("waiting for process 7", 0, None)
        clock.now += 9
        progress("waiting for process 7", 0, None)
    assert log.getvalue().splitlines() == ["  waiting for process 7", "  waiting for process 7  9 s"]


def test_a_download_that_goes_on_is_timed_by_what_came_now(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressLine(log, clock=clock) as progress:
        progress("downloading", 900 * MB, 1000 * MB)
        clock.now += 5
        progress("downloading", 950 * MB, 1000 * MB)
    assert log.getvalue().splitlines()[1] == "  downloading   95%  0.9 of 1.0 GB  10 MB/s  5 s left"


def test_control_characters_of_servers_do_not_reach_the_terminal(clock: Clock) -> None:
    terminal = Terminal()
    with ProgressLine(terminal, clock=clock) as progress:
        progress("hub: \033[2J\nbad\r\x07 reason", 0, None)
    assert terminal.getvalue() == "\r\033[K  hub: [2J bad reason" * 2 + "\n"


@pytest.mark.parametrize("total", [0, None])
def test_nothing_to_do_is_no_error(clock: Clock, total: int | None) -> None:
    log = io.StringIO()
    with ProgressLine(log, clock=clock) as progress:
        progress("checking", 0, total)
    assert log.getvalue().startswith("  checking")


def test_long_times_are_in_minutes(clock: Clock) -> None:
    log = io.StringIO()
    with ProgressLine(log, clock=clock) as progress:
        progress("loading", 0, 1000 * MB)
        clock.now += 10
        progress("loading", 1 * MB, 1000 * MB)
        clock.now += 100
        progress("loading", 300 * MB, 1000 * MB)
    lines = log.getvalue().splitlines()
    assert lines[1].endswith("100 kB/s  2 h 46 min left")
    assert lines[2].endswith("3 MB/s  4 min 17 s left")


def test_calls_from_several_threads(clock: Clock) -> None:
    log = io.StringIO()
    progress = ProgressLine(log, clock=clock)

    def work(name: str) -> None:
        for number in range(200):
            progress(name, number, 200)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.close()
    assert all(line.startswith(("  one", "  two")) for line in log.getvalue().splitlines())
