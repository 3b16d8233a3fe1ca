"""What graphs took is compared with what was kept for them, and said if memory may run short."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from headrace.workers import encoder_engine, engine, graph_memory
from headrace.workers.config import EngineConfig
from headrace.workers.encoder_runner import EncoderRunner
from headrace.workers.engines import load_engine
from headrace.workers.graph_memory import GraphMemory, compared
from headrace.workers.memory import GpuMemory, Needs
from headrace.workers.runner import Runner
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import save_model

GIB = 1 << 30


@pytest.fixture
def free(monkeypatch):
    """What a driver says, time after time, is free."""
    said = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (said.pop(0), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return said


@pytest.mark.parametrize(
    ("taken", "spare", "warns"),
    [
        *((GIB // 2, 0, False), (GIB, 0, False), (GIB + 1, 0, True)),
        *((3 * GIB, 2 * GIB, False), (3 * GIB + 1, 2 * GIB, True)),
        (-GIB, 0, False),  # another program ended meanwhile
    ],
)
def test_more_than_was_kept_is_a_warning_where_nothing_is_spare(caplog, free, taken, spare, warns):
    free += [60 * GIB, 60 * GIB - taken]
    with caplog.at_level(logging.INFO), compared(GraphMemory(kept=GIB, spare=spare)):
        assert len(free) == 1, "before they are captured"
    told, *warned = caplog.records
    assert (told.levelno, told.getMessage()) == (
        logging.INFO,
        f"CUDA graphs took {taken / GIB:.2f} GiB of the 1.00 GiB that were kept for them.",
    )
    assert [record.levelno for record in warned] == [logging.WARNING] * warns
    if warns:
        assert f"more than the {1 + spare / GIB:.2f} GiB" in warned[0].getMessage()
        assert "--max-num-seqs" in warned[0].getMessage()
        assert "--enforce-eager" in warned[0].getMessage()


def test_what_fails_is_not_compared(caplog, free):
    free += [60 * GIB, 10 * GIB]
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError), compared(GraphMemory(kept=0, spare=0)):
        raise RuntimeError
    assert not caplog.records


def test_where_nothing_was_kept_the_device_is_not_asked(free):
    with compared(None):
        pass  # the driver has nothing to say, and would fail


def test_what_is_spare_is_what_nothing_was_promised_to():
    memory = GpuMemory(total=100 * GIB, held=0, utilization=0.9)
    needs = Needs(weights=40 * GIB, workspace=GIB, graphs=2 * GIB, block=GIB, block_size=16)
    assert GraphMemory.of(memory, needs, 32) == GraphMemory(kept=2 * GIB, spare=43 * GIB)  # two blocks and two more
    assert GraphMemory.of(memory, needs, 16 * 45) == GraphMemory(kept=2 * GIB, spare=0)
    assert GraphMemory.of(memory, needs, 16 * 99) == GraphMemory(kept=2 * GIB, spare=0)


@pytest.mark.parametrize("save", [save_model, save_encoder])
def test_engines_compare_when_they_capture(tmp_path, monkeypatch, caplog, free, save):
    save(tmp_path)
    served = load_engine(tmp_path, EngineConfig(device="cpu", max_num_seqs=2, kv_tokens=160))
    served._graph_memory = GraphMemory(kept=GIB, spare=0)
    for kind in (Runner, EncoderRunner):
        monkeypatch.setattr(kind, "on_gpu", True)
        monkeypatch.setattr(kind, "capture", lambda self: free.append(10 * GIB))
        monkeypatch.setattr(kind, "compile_ahead", lambda self, compute: 0)
    free.append(15 * GIB)
    with caplog.at_level(logging.INFO, graph_memory.__name__):
        served.warm_up()
    assert [record.getMessage()[:25] for record in caplog.records] == ["CUDA graphs took 5.00 GiB"] * 2
    assert engine.compared is encoder_engine.compared is compared


def test_an_engine_without_graphs_does_not_compare(tmp_path, monkeypatch, free):
    save_model(tmp_path)
    served = load_engine(tmp_path, EngineConfig(device="cpu", max_num_seqs=2, kv_tokens=160, cuda_graphs=False))
    served._graph_memory = GraphMemory(kept=GIB, spare=0)
    served.warm_up()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_graphs_take_no_more_than_was_kept(tmp_path, monkeypatch, caplog, family):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("counts what other processes take of the GPU, too: run this file without -n")
    (save_encoder if family == "bert" else save_model)(tmp_path, family)
    judged = []
    monkeypatch.setattr(GraphMemory, "judge", lambda memory, taken: judged.append((taken, memory.kept)))
    served = load_engine(tmp_path, EngineConfig(device="cuda", gpu_memory_utilization=0.3))
    served.warm_up()
    ((taken, kept),) = judged
    assert 0 < taken <= kept
