"""Measurements in process, end to end on a CPU: rows, tables, peers that fail. How fast anything is, is not tested.

Each starts real processes, so one test looks at all that a run shows.
"""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from headrace.scripts.main import cli
from tests.support.tiny_models import save_model


def test_decode(bench, tmp_path):
    """Ours, a peer, one that is not installed and ours without graphs; two shapes, one an encoder-decoder."""
    done = bench(
        "decode --shape tiny --shape tiny-t5 --batch 1 --batch 3 --prompt-tokens 20 --output-tokens 6 "
        f"--peer transformers --peer vllm --peer headrace-eager --profile {tmp_path / 'traces'}"
    )

    assert [(row["model"], row["case"]["batch"]) for row in done.rows] == [
        (shape, batch) for shape in ("tiny", "tiny-t5") for batch in (1, 3)
    ]
    for row in done.rows:
        figures = row["figures"]
        assert list(figures) == ["headrace", "transformers", "vllm", "headrace-eager"]
        assert figures["vllm"] == {"error": "vllm is not installed"}
        for name in ("headrace", "transformers", "headrace-eager"):
            assert 0 < figures[name]["value"] <= figures[name]["p99_ms"]
        assert figures["headrace"]["steps"] >= 2
        assert figures["transformers"]["times_ours"] > 0
        assert 0 < row["limit"] < figures["headrace"]["value"]
        assert row["goal"] is None  # goals are those of one device
        assert row["published"] == {}
    assert done.facts["device"] == "CPU, 1 threads"
    assert done.facts["read GB/s"] == 10
    table = done.output.splitlines()
    assert any(line.split()[:5] == ["tiny", "float32", "3", "20", "6"] for line in table)
    assert "by vllm: vllm is not installed" in done.output
    assert "attention" in done.output
    assert len(list((tmp_path / "traces").glob("*.trace.json"))) == 4
    trace = json.loads((tmp_path / "traces/tiny-decode-batch-1.trace.json").read_text())
    assert any("linear" in event.get("name", "") for event in trace["traceEvents"])


@pytest.mark.parametrize(
    ("words", "unit", "details"),
    [
        (
            "latency --shape tiny --batch 2 --prompt-tokens 9 --output-tokens 5 --rounds 2",
            "ms",
            {"first_token_ms", "tokens_per_s", "decode_tokens_per_s"},
        ),
        ("prefill --shape tiny --prompt-tokens 40 --rounds 2 --no-peers", "tok/s", {"first_token_ms"}),
        (
            "throughput --shape tiny --requests 5 --prompt-tokens 9 --output-tokens 4 --no-peers",
            "tok/s",
            {"duration_s", "requests_per_s"},
        ),
        ("encode --shape tiny-bert --batch 2 --prompt-tokens 9 --rounds 2", "ms", {"p99_ms", "passes"}),
    ],
)
def test_the_others(bench, words, unit, details):
    done = bench(words)

    [row] = done.rows
    assert row["measure"] == words.split()[0]
    assert row["unit"] == unit
    assert set(row["figures"]) == {"headrace"} | (set() if "--no-peers" in words else {"transformers"})
    assert details <= set(row["figures"]["headrace"])
    value, limit = row["figures"]["headrace"]["value"], row["limit"]
    assert 0 < limit < value if unit == "ms" else 0 < value < limit


def test_tokens_that_are_drawn(bench):
    """By ours and by a peer; the row says how."""
    done = bench("decode --shape tiny --prompt-tokens 9 --output-tokens 6 --temperature 0.8 --top-p 0.9")

    [row] = done.rows
    assert row["case"] == {"batch": 1, "prompt_tokens": 9, "output_tokens": 6, "temperature": 0.8, "top_p": 0.9}
    assert row["figures"]["headrace"]["value"] > 0
    assert row["figures"]["transformers"]["value"] > 0
    [line] = [line for line in done.output.splitlines() if line.startswith("tiny ")]
    assert line.split()[:7] == ["tiny", "float32", "1", "9", "6", "0.8", "0.9"]


@pytest.mark.parametrize(
    "words",
    [
        "decode --shape tiny --prompt-tokens 9 --output-tokens 6",
        "decode --shape tiny --prompt-tokens 9 --output-tokens 6 --quantize int8",
        "encode --shape tiny-bert --prompt-tokens 9 --rounds 1",
    ],
)
def test_the_library_as_a_peer(bench, words):
    [row] = bench(f"{words} --peer headrace-library").rows
    assert list(row["figures"]) == ["headrace", "headrace-library"]
    assert row["figures"]["headrace-library"]["value"] > row["limit"]


def test_a_profile_of_prompts(bench, tmp_path):
    """Of the whole run; how much is computed is known of products and of attention."""
    done = bench(f"prefill --shape tiny --prompt-tokens 400 --rounds 1 --no-peers --profile {tmp_path}")

    kinds = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.count("%") > 1}
    assert {"matmul", "attention"} <= set(kinds)
    # Of two layers of four heads of 16 numbers, one sees half of the square and the other one row.
    assert float(kinds["attention"][5]) == pytest.approx(4 * 4 * 16 * (80_000 + 400) / 1e9, abs=0.001)


def test_a_model_with_weights(bench, tmp_path):
    """A folder: its own weights, dtype and name; no graphs for ours."""
    folder = tmp_path / "mine"
    folder.mkdir()
    save_model(folder)
    done = bench(f"decode --shape {folder} --prompt-tokens 9 --output-tokens 5 --enforce-eager")

    [row] = done.rows
    assert row["model"] == "mine"
    assert row["figures"]["headrace-eager"]["value"] > 0
    assert row["figures"]["transformers"]["value"] > 0


def test_a_model_that_is_not_covered(tmp_path):
    """The process that looked at it cannot; the person gets the error as `headrace up` gives it."""
    save_model(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["MambaForCausalLM"]}))
    result = CliRunner().invoke(cli, ["bench", "decode", "--shape", str(tmp_path)])

    assert result.exit_code == 2, result.output
    assert "MambaForCausalLM" in result.output
    assert "Traceback" not in result.output


def test_what_does_not_fit_costs_its_row(bench):
    """GPT-2's positions end at 1,024; fewer layers make it quick."""
    done = bench("decode --shape gpt2-xl --layers 1 --dtype float32 --prompt-tokens 1020 --output-tokens 8 --no-peers")

    [row] = done.rows
    assert row["figures"] == {"headrace": {"error": "the model was made for 1,024 tokens"}}
    assert "failed" in done.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("decode --shape no-such-model/", "no-such-model/"),
        ("decode --shape tiny-bert", "tiny-bert is an encoder"),
        ("encode --shape tiny", "tiny generates"),
        ("decode --shape tiny --top-p 0.9", "give a --temperature"),
        ("decode --shape tiny --device cuda:99", "device is 'cuda:99'"),
        ("decode --shape tiny --json no/such/folder.json", "There is no folder"),
        ("plot setup.py", "is no file that `headrace bench --json`"),
    ],
)
def test_wrong_values_are_named(words, expected, monkeypatch):
    from tests.scripts.commands import ROOT

    monkeypatch.chdir(ROOT)
    ceilings = () if words.startswith("plot") else ("--read-gb-s", "1", "--matmul-tflop-s", "1")
    result = CliRunner().invoke(cli, ["bench", *words.split(), *ceilings])

    assert result.exit_code == 2, result.output
    assert expected in result.output
    assert "Traceback" not in result.output


def test_ceilings_are_measured():
    import torch

    from headrace.benchmarks.ceilings import matmul_rate, read_rate

    cpu = torch.device("cpu")

    assert 1e8 < read_rate(cpu) < 1e13
    assert 1e8 < matmul_rate(cpu, torch.float32) < 1e15
    assert 1e7 < matmul_rate(cpu, torch.float8_e4m3fn) < 1e15
