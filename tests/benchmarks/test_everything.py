"""What `headrace bench all` measures of which model, with a session that only notes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from headrace.benchmarks import everything
from headrace.benchmarks.everything import PARTS, known_shapes, measure_everything
from headrace.benchmarks.report import Report
from headrace.benchmarks.shapes import SHAPES, find_source
from headrace.errors import ModelFilesError
from headrace.scripts.main import cli


class Session:
    """Notes what it is asked for; on an H200."""

    ours = "headrace"
    over = False

    def __init__(self, *shapes):
        self.settings = SimpleNamespace(sources=tuple(find_source(name) for name in shapes), seed=0)
        self.report = Report(None, {"device": "NVIDIA H200"})
        self.terminal = SimpleNamespace(note=lambda text: self.notes.append(text))
        self.notes = []
        self.cases = []

    def model(self, source):
        return {"generates": "bert" not in source.name, "dtype": source.dtype}

    def compare(self, cases):
        self.cases += [
            (
                case.measure,
                *((case.source.quantize,) if case.source.quantize else ()),
                case.batch,
                case.prompt_tokens,
                case.output_tokens,
                not case.alone,
            )
            for case in cases
        ]


@pytest.fixture
def others(monkeypatch):
    """What was started, served and compared."""
    seen = []
    monkeypatch.setattr(everything, "startup", lambda _, source, starts: seen.append(("startup", source.name, starts)))
    monkeypatch.setattr(
        everything, "serve_source", lambda _, source, load: seen.append(("serve", source.name, load.rate))
    )
    monkeypatch.setattr(
        everything, "compare", lambda _, source, **load: seen.append(("compare", source.name, load["requests"]))
    )
    return seen


def test_a_shape_with_published_figures(others):
    """Their cases; peers only where one sequence is decoded; weights in 8 bits come last in their part."""
    session = Session("llama-8b")
    measure_everything(session, list(PARTS))

    assert session.cases == [
        ("decode", 1, 128, 48, True),
        ("decode", 16, 1024, 128, False),
        ("decode", 64, 1024, 128, False),
        ("decode", "fp8", 1, 128, 48, True),
        ("decode", "int8", 1, 128, 48, True),
        ("prefill", 1, 8192, 1, False),
        ("throughput", 256, 512, 256, False),
        ("throughput", "fp8", 256, 512, 256, False),
    ]
    assert others == [("startup", "llama-8b", 1), ("compare", "llama-8b", 256), ("serve", "llama-8b", 4.0)]
    assert session.report.rows == []


def test_all_of_a_shape_in_8_bits(others):
    """Every case of it once, whether something is published of it or not."""
    session = Session()
    session.settings.sources = (find_source("llama-8b", quantize="fp8"),)
    measure_everything(session, list(PARTS))

    assert session.cases == [
        ("decode", "fp8", 1, 128, 48, True),
        ("decode", "fp8", 16, 1024, 128, False),
        ("decode", "fp8", 64, 1024, 128, False),
        ("prefill", "fp8", 1, 8192, 1, False),
        ("throughput", "fp8", 256, 512, 256, False),
    ]
    assert [part for part, *_ in others] == ["startup", "compare", "serve"]


def test_an_encoder(others):
    session = Session("bert-large")
    measure_everything(session, list(PARTS))

    assert session.cases == [("encode", 1, 128, 0, True)]
    assert others == []


def test_a_shape_without_published_figures(others):
    """A small case of each part."""
    session = Session("tiny")
    measure_everything(session, list(PARTS))

    assert session.cases == [
        ("decode", 1, 128, 32, True),
        ("prefill", 1, 512, 1, False),
        ("throughput", 8, 64, 32, False),
    ]
    assert [part for part, *_ in others] == ["startup", "compare", "serve"]


def test_another_type_has_no_published_figures(others):
    """Goals are for 16 bits; other types are measured by the commands of their own."""
    session = Session()
    session.settings.sources = (find_source("llama-8b", dtype="float32"),)
    measure_everything(session, ["decode", "prefill"])

    assert session.cases == []


def test_a_failure_costs_its_part(others, monkeypatch):
    def fail(*_, **__):
        raise ModelFilesError("The disk is full.")

    monkeypatch.setattr(everything, "startup", fail)
    session = Session("tiny")
    measure_everything(session, ["startup", "serve"])

    [row] = session.report.rows
    assert row.figures == {"headrace": {"error": "The disk is full."}}
    assert [part for part, *_ in others] == ["serve"]


def test_the_command_measures_the_known_shapes():
    """The command names them itself, so that its help imports nothing."""
    command = cli.get_command(None, "bench").get_command(None, "all")
    options = {option.name: option for option in command.params}

    assert tuple(options["shapes"].default) == known_shapes()
    assert set(options["parts"].type.choices) == set(PARTS)
    shown = cli.get_command(None, "bench").get_command(None, "decode").params[0].help
    assert all(name in shown for name in SHAPES if not name.startswith("tiny"))
