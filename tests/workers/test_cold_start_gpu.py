"""A cold start on a GPU: what is compiled ahead is all that is compiled, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import save_model, save_t5

pytestmark = pytest.mark.gpu

# Starts an engine, and says what it found; "alone" lets each launch compile its own.
SCRIPT = """
import dataclasses, json, os, sys, threading
from pathlib import Path
from headrace.workers import encoder_runner, runner
from headrace.workers.config import EngineConfig
from headrace.workers.engines import load_engine
from headrace.workers.parallel_compile import compiled_ahead

if sys.argv[2] == "alone":
    for module in (runner, encoder_runner):
        module.compile_ahead = lambda rehearse, device: 0
engine = load_engine(Path(sys.argv[1]), EngineConfig(max_num_seqs=20, max_batch_tokens=300, device="cuda"))
engine.warm_up()
found = {
    "kernels": sorted(str(path.parent.name) for path in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")),
    "ahead": dataclasses.asdict(compiled_ahead()),
    "compilations": engine.load_gauges()["compilations"],
    "threads": [thread.name for thread in threading.enumerate() if thread.name.startswith("compile")],
}
print(json.dumps(found))
"""


def start(folder, cache, how="ahead"):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    command = [sys.executable, "-c", SCRIPT, str(folder), how]
    ran = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_all_that_a_start_compiles_is_compiled_ahead(tmp_path, family):
    {"t5": save_t5, "bert": save_encoder}.get(family, save_model)(tmp_path / "model", family)
    cold = start(tmp_path / "model", tmp_path / "cache")
    assert cold["ahead"]["kernels"] == len(cold["kernels"]) > 5
    assert cold["ahead"]["threads"] >= 1
    assert (cold["compilations"], cold["threads"]) == (0, [])
    warm = start(tmp_path / "model", tmp_path / "cache")
    assert warm["ahead"]["kernels"] == 0
    assert warm["kernels"] == cold["kernels"]


def test_it_is_what_launches_would_have_compiled(tmp_path):
    save_model(tmp_path / "model", "llama")
    alone = start(tmp_path / "model", tmp_path / "one", "alone")
    ahead = start(tmp_path / "model", tmp_path / "other")
    assert alone["ahead"]["kernels"] == 0
    assert ahead["kernels"] == alone["kernels"]
