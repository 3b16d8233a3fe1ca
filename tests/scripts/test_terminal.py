"""What commands write, and to whom."""

import io
import sys

import pytest

from headrace.scripts.answer import Answer
from headrace.scripts.phases import Phases
from headrace.scripts.terminal import Terminal, printable, table


class Screen(io.StringIO):
    """A terminal that keeps what it was sent."""

    def isatty(self):
        return True


@pytest.fixture
def look(monkeypatch):
    """Makes one terminal of both outputs, as a person has it; to be called in the test, for pytest sets them before."""

    def look():
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return screen, Terminal()

    return look


def shown(screen):
    """The lines that a person sees in the end."""
    return [line.rpartition("\r\x1b[K")[2] for line in screen.getvalue().split("\n")]


def test_remarks_make_room_in_streamed_text(look):
    screen, terminal = look()

    terminal.stream("half a ")
    terminal.stream("sentence")
    terminal.note("The gateway is back.")
    terminal.stream(" goes on")
    terminal.end_stream()
    terminal.end_stream()

    assert shown(screen) == ["half a sentence", "The gateway is back.", " goes on", ""]


def test_lines_make_room_for_the_changing_one(look):
    screen, terminal = look()
    phases = Phases(terminal)

    phases("loading", 5, 10)
    terminal.note("group-0: lost rank 0")
    phases("loading", 10, 10)
    phases("warming up")
    phases.end()
    phases.tick()
    terminal.say("ready")

    lines = shown(screen)
    assert lines[0] == "group-0: lost rank 0"
    assert lines[1].startswith("  loading")
    assert lines[2].startswith("  warming up")
    assert lines[3:] == ["ready", ""]


def test_long_phases_are_seen_to_be_alive(monkeypatch, capsys):
    from headrace.scripts import progress

    now = [0.0]
    monkeypatch.setattr(progress.ProgressLine.__init__, "__kwdefaults__", {"clock": lambda: now[0], "indent": "  "})
    phases = Phases(Terminal())

    phases("warming up")
    for now[0] in range(1, 12):
        phases.tick()
    phases.end()

    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["warming"] * 3


def test_results_and_remarks_go_apart(capsys):
    terminal = Terminal()

    terminal.say("result")
    terminal.note("remark")
    terminal.stream("\x1b[31mraw")

    assert tuple(capsys.readouterr()) == ("result\n\x1b[31mraw", "remark\n")


def test_colour_needs_two_terminals(look, monkeypatch):
    assert look()[1].paint("a", "bold", "red") == "\x1b[1;31ma\x1b[0m"

    monkeypatch.setattr(sys, "stderr", io.StringIO())

    assert Terminal().paint("a", "bold") == "a"


def test_missing_outputs_are_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    terminal = Terminal()

    terminal.say("a")
    terminal.note("b")
    terminal.stream("c")
    terminal.draw("d")


def test_letters_that_an_output_cannot_show(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Terminal().say("60 °C")

    assert raw.getvalue() == b"60 ?C\n"


def test_printable_keeps_text_and_drops_control():
    assert printable("Grüße\n\t日本 👍") == "Grüße\n\t日本 👍"
    assert printable("\x1b[2J\x07\x9b1m\r\x00") == "\ufffd[2J\ufffd\ufffd1m\ufffd\ufffd"


def test_table_aligns_figures_to_the_right():
    assert table(["NAME", "COUNT"], [["a", "1"], ["long", "1000"], ["b", "-"]]) == [
        "NAME  COUNT",
        "a         1",
        "long   1000",
        "b         -",
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tokens": 10, "first_token": 0.5, "rate": 12.34}, "10 tokens, 12.3 tok/s, first token 0.50 s"),
        ({"tokens": 1, "first_token": 2.0, "rate": None}, "1 token, first token 2.00 s"),
        ({"tokens": 0, "first_token": None, "rate": None}, "0 tokens"),
        (
            {"tokens": 2, "first_token": 1.0, "rate": 1.0, "finish_reason": "length"},
            "2 tokens, 1.0 tok/s, first token 1.00 s, ended at the limit of tokens",
        ),
    ],
)
def test_figures_of_an_answer(fields, expected):
    assert Answer(text="", **{"finish_reason": "stop"} | fields).figures() == expected
