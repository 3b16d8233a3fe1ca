"""Tables, goals and pictures, out of rows made by hand."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner

from headrace.benchmarks import plots, published
from headrace.benchmarks.report import PHASES, Report, Row, amount, read_report, report_lines, span, verdict
from headrace.benchmarks.shapes import SHAPES
from headrace.benchmarks.traces import kernel_lines, kind_of
from headrace.errors import ConfigError
from headrace.kernels.ops import (
    attend_triton,
    decode_triton,
    experts_triton,
    gemv_triton,
    gemv_two_triton,
    keep_triton,
    skinny_triton,
)
from headrace.scripts.main import cli

FACTS = {"device": "NVIDIA H200", "date": "2026-11-25", "read GB/s": 4380.0, "ceilings": {"read": 4.38e12}}


def row(value=3.9, **changes):
    """A decode step of an 8B model on an H200."""
    fields = {
        "measure": "decode",
        "title": "Decode: ms from step to step",
        "unit": "ms",
        "model": "llama-8b",
        "dtype": "bfloat16",
        "case": {"batch": 1, "prompt_tokens": 128, "output_tokens": 48},
        "figures": {"headrace": {"value": value, "p99_ms": 4.1}, "transformers": {"value": 28.13}},
        "limit": 3.43,
        "goal": 3.75,
        "published": {"vLLM 0.26": 4.93, "transformers eager": (13.7, 22.6)},
    }
    return Row(**fields | changes)


def test_a_table():
    failed = row(model="opt-6.7b", figures={"headrace": {"error": "OutOfMemoryError: 12 GB"}}, published={}, goal=None)
    text = "\n".join(report_lines(FACTS, [row(), failed]))

    [line] = [line for line in text.splitlines() if line.startswith("llama-8b")]
    cells = line.split()
    for cell in ("3.900", "28.13", "3.430", "88%", "3.750", "missed", "(+4%)", "4.930", "13.70-22.60"):
        assert cell in cells, (cell, line)
    assert "vLLM 0.26*" in text
    assert f"measured elsewhere: on one NVIDIA H200, {published.DATE}" in text
    assert "decode of opt-6.7b (batch 1, prompt 128, output 48) by headrace: OutOfMemoryError: 12 GB" in text


@pytest.mark.parametrize(
    ("value", "more", "expected"),
    [(3.0, False, "met (-20%)"), (3.75, False, "met (+0%)"), (4.5, False, "missed (+20%)"), (4.5, True, "met (+20%)")],
)
def test_verdicts(value, more, expected):
    assert verdict(row(value, more_is_better=more)) == expected


def test_a_goal_without_a_figure():
    assert verdict(row(figures={})) == "not measured"
    assert verdict(row(goal=None)) == "-"


def test_amounts():
    assert [amount(n) for n in (None, 3, 0.5712, 3.431, 28.127, 115.04, 9950.4)] == [
        "-",
        "3",
        "0.571",
        "3.431",
        "28.13",
        "115.0",
        "9,950",
    ]
    assert span((13.7, 22.6)) == "13.70-22.60"


def test_the_file_is_whole_after_every_row(tmp_path):
    path = tmp_path / "out.json"
    report = Report(path, FACTS)
    for value in (1.0, 2.0):
        report.add(row(value))
        facts, rows = read_report(path)
        assert facts == json.loads(json.dumps(FACTS))
        assert rows[-1].value("headrace") == value
    assert len(rows) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_figures_in_the_file_have_as_many_digits_as_mean_something(tmp_path):
    path = tmp_path / "out.json"
    Report(path, FACTS).add(row(0.7852119999824936, limit=4_379_123_456.7))
    _, [found] = read_report(path)

    assert found.value("headrace") == 0.785212
    assert found.limit == 4_379_120_000
    assert found.case["batch"] == 1


def test_goals_are_those_of_the_device():
    case = {"batch": 1, "prompt_tokens": 128, "output_tokens": 48}

    assert Report(None, FACTS).known("decode", "llama-8b", "bfloat16", **case)["goal"] == 3.75
    assert Report(None, {"device": "NVIDIA H100"}).known("decode", "llama-8b", "bfloat16", **case) == {}
    assert Report(None, FACTS).known("decode", "llama-8b", "float32", **case) == {}


def test_goals_are_those_of_what_a_model_is_quantized_in():
    one = {"batch": 1, "prompt_tokens": 128, "output_tokens": 48}
    many = {"batch": 256, "prompt_tokens": 512, "output_tokens": 256}

    def known(measure, quantize, case):
        return Report(None, FACTS).known(measure, "llama-8b", "bfloat16", quantize, **case)

    assert known("decode", None, one)["goal"] == 3.75
    assert known("decode", "fp8", one) == {"goal": 2.3, "published": {"vLLM 0.26": 3.47}}
    assert known("decode", "int8", one) == {"goal": 2.3, "published": {}}
    assert known("decode", "fp8", one | {"batch": 16, "prompt_tokens": 1024}) == {}
    assert known("throughput", None, many)["goal"] == 11_000
    assert known("throughput", "fp8", many) == {"goal": 14_500, "published": {"vLLM 0.26": 13_200}}
    assert known("throughput", "int8", many) == {}
    assert known("startup warm", "fp8", {}) == {}


def test_a_quantized_row_says_so():
    failed = row(quantize="fp8", figures={"headrace": {"value": 2.2}, "vllm": {"error": "vllm is not installed"}})
    text = "\n".join(report_lines(FACTS, [row(), failed]))

    plain, quantized = [line for line in text.splitlines() if line.startswith("llama-8b")]
    assert plain.split()[:3] == ["llama-8b", "bfloat16", "1"]
    assert quantized.split()[:4] == ["llama-8b", "bfloat16,", "fp8", "1"]
    assert "decode of llama-8b, fp8 (batch 1, prompt 128, output 48) by vllm: vllm is not installed" in text
    assert [plots._label(each) for each in (row(), failed)] == [
        "llama-8b, batch 1, prompt 128",
        "llama-8b, fp8, batch 1, prompt 128",
    ]


def test_a_file_of_before_weights_were_quantized_can_be_read(tmp_path):
    path = tmp_path / "out.json"
    Report(path, FACTS).add(row())
    content = json.loads(path.read_text())
    del content["rows"][0]["quantize"]
    path.write_text(json.dumps(content))

    assert read_report(path)[1] == [row(published={"vLLM 0.26": 4.93, "transformers eager": [13.7, 22.6]})]


def test_published_figures_are_of_shapes_that_exist():
    assert {entry.shape for entry in published.PUBLISHED} <= set(SHAPES)
    keys = [(e.measure, e.shape, e.dtype, e.quantize, e.batch, e.prompt_tokens) for e in published.PUBLISHED]
    assert len(keys) == len(set(keys))


def test_pictures_need_matplotlib(monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r'pip install "headrace\[bench\]"'):
        plots.plot_report(FACTS, [row()], None)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_pictures_of_a_file(tmp_path):
    """Of every kind of row; `plot` needs nothing but the file."""
    path = tmp_path / "out.json"
    report = Report(path, FACTS)
    report.add(row())
    phases = {f"{name}_s": 1.0 for name in PHASES}
    report.add(row(measure="startup cold", title="Start", figures={"headrace": {"value": 5.0, **phases}}))
    times = {f"{name}_p{share}_ms": 10.0 + share for name in ("ttft", "tpot", "itl", "e2e") for share in (50, 99)}
    report.add(row(measure="serve", title="Serve", figures={"headrace": {"value": 5.0, **times}}))
    report.add(row(title="All failed", figures={"headrace": {"error": "no"}}))

    result = CliRunner().invoke(cli, ["bench", "plot", str(path), "--folder", str(tmp_path / "plots")])

    assert result.exit_code == 0, result.output
    assert "llama-8b" in result.output
    files = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert files == ["decode-ms-from-step-to-step.png", "serve.png", "start.png"]


def test_kinds_of_our_kernels():
    """By the names that a profiler shows: those of their functions."""
    products = [gemv_triton.gemv, skinny_triton.skinny, gemv_two_triton.gemv_both, gemv_two_triton.gemv_sum]
    products += [keep_triton.keep, experts_triton._product, experts_triton._up, experts_triton._down]

    assert {kind_of(kernel.__name__) for kernel in products} == {"matmul"}
    assert {kind_of(kernel.__name__) for kernel in (attend_triton._attend, decode_triton._decode)} == {"attention"}


def test_kinds_of_kernels():
    assert kind_of("_skinny_linear_kernel") == kind_of("nvjet_tst_128x64") == kind_of("aten::mm") == "matmul"
    assert kind_of("_attend_kernel") == kind_of("aten::_scaled_dot_product_flash_attention") == "attention"
    assert kind_of("_add_norm_kernel") == kind_of("aten::mul") == "other"


def test_kernels_with_the_rate_at_which_they_read():
    """Two steps: 8 ms of products that read 16 GB and do 1 TFLOP in each are 4 TB/s and 250 TFLOP/s."""
    kernels = [{"name": "_linear", "calls": 64, "ms": 8.0}, {"name": "_norm", "calls": 2, "ms": 2.0}]
    kernels.append({"name": "_attend", "calls": 2, "ms": 1.0})
    work = {
        "matmul": {"bytes": 16e9, "flops": 1e12, "reading": 0.00364, "computing": 0.00126},
        "attention": {"bytes": 0.0, "flops": 2.5e10, "reading": 0.0, "computing": 0.0001},
    }
    lines = kernel_lines({"steps": 2, "kernels": kernels}, work)

    assert lines[1].split() == ["4,000.0", "72.7%", "32.0", "_linear"]
    by_kind = {line.split()[0]: line.split()[1:] for line in lines[-3:]}
    assert by_kind == {
        "matmul": ["4,000.0", "72.7%", "16,000", "4,000", "91%", "1,000", "250.0", "32%"],
        "attention": ["500.0", "9.1%", "-", "-", "-", "25.00", "50.00", "20%"],
        "other": ["1,000.0", "18.2%", *["-"] * 6],
    }
