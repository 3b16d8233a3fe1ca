"""`--quantize`: who gets to know it, and what becomes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headrace.benchmarks import peers, startup
from headrace.benchmarks.ours import config_for
from headrace.benchmarks.peers import VLLM, DeepSpeed, Transformers
from headrace.benchmarks.report import Report
from headrace.benchmarks.session import Session, Settings
from headrace.benchmarks.shapes import find_source
from headrace.benchmarks.subject import Room
from headrace.errors import UnsupportedModelError

ROOM = Room(sequences=2, length=9, tokens=18, step_tokens=64, seed=0)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_quantized_model(bench, quantize):
    """Ours of a shape, and peers that have no such weights."""
    done = bench(
        f"decode --shape tiny --quantize {quantize} --prompt-tokens 9 --output-tokens 6 --peer transformers --peer vllm"
    )

    [row] = done.rows
    assert (row["dtype"], row["quantize"]) == ("float32", quantize)
    assert row["figures"]["headrace"]["value"] > 0
    assert f"no mode here in which it keeps a model's weights as {quantize}" in row["figures"]["transformers"]["error"]
    assert "error" in row["figures"]["vllm"]
    # 61,440 bytes of projections; 896 factors, 19,520 other weights, and 12 tokens of 128 keys and values in float32.
    assert row["limit"] == pytest.approx((61_440 + 4 * (896 + 19_520 + 12 * 128)) / 10e9 * 1e3)
    assert [line.split()[:3] for line in done.output.splitlines() if line.startswith("tiny ")] == [
        ["tiny", "float32,", quantize]
    ]


def test_both_ways_of_a_quantized_model(bench):
    """In process, and by a worker group that quantizes the folder's weights while it loads them."""
    done = bench("compare --shape tiny --quantize int8 --requests 2 --prompt-tokens 9 --output-tokens 4")

    assert [(row["measure"], row["quantize"]) for row in done.rows] == [
        (measure, "int8") for measure in ("throughput", "latency", "compare throughput", "compare first token")
    ]
    assert all(row["figures"]["headrace"]["value"] > 0 for row in done.rows)


def test_engines_are_configured_so():
    source = find_source("tiny", quantize="int8")

    assert config_for(ROOM, source, 100, device="cpu", graphs=True).quantize == "int8"


def test_groups_are_started_so(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(startup, "_figure", lambda spec, count: started.append(spec.config.quantize) or {"value": 1.0})
    session = SimpleNamespace(
        settings=SimpleNamespace(device="cpu", eager=False),
        threads=1,
        report=Report(None, {}),
        folder=lambda source: tmp_path,
        model=lambda source: {"dtype": "float32"},
    )
    startup.startup(session, find_source("tiny", quantize="fp8"), starts=1)

    assert started == ["fp8", "fp8"]
    assert [row.name for row in session.report.rows] == ["tiny, cold, fp8", "tiny, warm, fp8"]


def test_a_folder_is_written_once_for_all_ways_to_quantize_it(monkeypatch):
    written = []
    session = Session(Settings(sources=()), SimpleNamespace(note=lambda text: None))
    monkeypatch.setattr(session, "release", lambda: None)
    monkeypatch.setattr(session, "ask", lambda order, source, **_: written.append((order, source["quantize"])))
    with session._stack:
        folders = {session.folder(find_source("tiny", quantize=quantize)) for quantize in (None, "int8", "fp8")}

    assert len(folders) == 1
    assert written == [("write", None)]


@pytest.mark.parametrize(
    ("peer", "quantize"), [(Transformers, "int8"), (Transformers, "fp8"), (DeepSpeed, "int8"), (VLLM, "int8")]
)
def test_peers_that_cannot_refuse(peer, quantize):
    with pytest.raises(UnsupportedModelError, match=quantize):
        peer(torch.device("cpu")).load(find_source("tiny", quantize=quantize), ROOM)


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_vllm_quantizes_while_it_loads(monkeypatch, quantize):
    asked = {}
    vllm = SimpleNamespace(LLM=lambda **settings: asked.update(settings))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 10))
    versions = SimpleNamespace(metadata=SimpleNamespace(version=lambda name: "0.26"))
    monkeypatch.setattr(peers, "importlib", versions)
    peer = VLLM(torch.device("cuda"))
    peer.load(find_source("tiny", quantize=quantize), ROOM)
    folder = Path(asked["model"])
    peer.unload()

    assert asked["quantization"] == quantize
    assert not folder.exists()
