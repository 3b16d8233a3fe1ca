"""Models loaded onto a GPU are those that a CPU loads, bit by bit, whatever their files, types and layouts."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.model import Model
from headrace.kernels.quantize import SCHEMES
from headrace.workers import parallel_reader
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.config import EngineConfig
from headrace.workers.engine import Engine
from headrace.workers.engines import load_engine
from headrace.workers.loader import load_model
from tests.support.quantized import same_bytes
from tests.support.tiny_models import FAMILIES, make_model, save_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("piece", [1000, 8 << 20])
def test_what_a_gpu_gets_is_what_a_cpu_gets(family, dtype, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_reader, "_PIECE", piece)
    monkeypatch.setattr(Model, "pack", lambda model: None)  # each device has its own layout of matrices
    make_model(family).save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = Checkpoint(tmp_path)
    here = load_model(checkpoint, dtype=dtype, device="cpu")
    there = load_model(checkpoint, dtype=dtype, device="cuda")
    expected, found = dict(here.named_parameters()), dict(there.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.is_cuda
        assert parameter.dtype is expected[name].dtype
        assert torch.equal(parameter.cpu(), expected[name]), name


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-40b"])
def test_a_gpu_quantizes_as_a_cpu_does(family, dtype, scheme, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "pack", lambda model: None)
    make_model(family).save_pretrained(tmp_path, max_shard_size="100KB")
    here, there = (
        load_model(tmp_path, dtype=dtype, device=device, scheme=SCHEMES[scheme]) for device in ("cpu", "cuda")
    )
    assert all(scale.is_cuda for scale in there.scales().values())
    assert same_bytes(here, there.cpu())


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_weights_in_8_bits_that_are_loaded_beside_a_rehearsal_are_complete(scheme, tmp_path, monkeypatch):
    save_model(tmp_path, "llama")
    config = EngineConfig(device="cuda", max_num_seqs=8, max_batch_tokens=64, quantize=scheme)
    engine = load_engine(tmp_path, config)
    assert isinstance(engine, Engine)
    assert engine._rehearsed == engine.card.max_model_len
    monkeypatch.setattr(Model, "pack", lambda model: None)
    assert same_bytes(load_model(tmp_path, scheme=SCHEMES[scheme]), engine._runner.model.cpu())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_is_loaded_beside_a_rehearsal_is_complete(family, tmp_path, monkeypatch):
    """Kernels are compiled while a thread fills the model: none of them writes to it, and none of it is missing."""
    monkeypatch.setattr(parallel_reader, "_PIECE", 1000)
    save_model(tmp_path, family)
    engine = load_engine(tmp_path, EngineConfig(device="cuda", max_num_seqs=8, max_batch_tokens=64))
    assert isinstance(engine, Engine)
    assert engine._rehearsed == engine.card.max_model_len
    monkeypatch.setattr(Model, "pack", lambda model: None)
    expected = dict(load_model(tmp_path).named_parameters())
    found = dict(engine._runner.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter.cpu(), expected[name]), name


def test_loading_needs_no_second_model_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_reader, "_AHEAD", 1 << 20)
    make_model("llama", hidden_size=1536, intermediate_size=4096, num_hidden_layers=8).save_pretrained(tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(tmp_path, device="cuda")
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert torch.cuda.max_memory_allocated() - before <= size + 2 * largest + (4 << 20)
