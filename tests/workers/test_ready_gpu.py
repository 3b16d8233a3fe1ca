"""What READY promises on a GPU: nothing is compiled or captured afterwards, and memory stays within what is allowed."""

from __future__ import annotations

import logging

import pytest
import torch

from headrace.kernels.ops import attend_triton
from headrace.kernels.quantize import SCHEMES
from headrace.messages import Assignment, pack_tokens
from headrace.workers.config import EngineConfig
from headrace.workers.engines import load_engine
from tests.support.mixed_load import MIXED_LOAD_CONFIG, MIXED_LOAD_FAMILIES, run_mixed_load
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import save_model, save_t5
from tests.workers.test_ready import all_in_place, read_texts, serve_long_texts

pytestmark = pytest.mark.gpu

WIDE = {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
WIDE_CONFIG = {"kv_tokens": 24_576, "max_num_seqs": 20, "max_batch_tokens": 4096}


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.mark.parametrize(("graphs", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float32")])
@pytest.mark.parametrize("family", MIXED_LOAD_FAMILIES)
def test_nothing_is_compiled_once_it_is_ready(tmp_path, caplog, family, graphs, dtype):
    check_that_nothing_is_compiled(tmp_path, caplog, family, graphs=graphs, dtype=dtype)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_nothing_is_compiled_once_it_is_ready_with_weights_in_8_bits(tmp_path, caplog, family, scheme, graphs):
    check_that_nothing_is_compiled(tmp_path, caplog, family, graphs=graphs, dtype="bfloat16", quantize=scheme)


def check_that_nothing_is_compiled(tmp_path, caplog, family, *, graphs, **settings):
    (save_t5 if family == "t5" else save_model)(tmp_path, family)
    engine = load_engine(tmp_path, EngineConfig(**MIXED_LOAD_CONFIG, cuda_graphs=graphs, **settings))
    engine.warm_up()
    ready = engine.load_gauges()
    assert ready["compilations"] == 0
    assert bool(ready["graphs"]) is graphs

    caplog.set_level(logging.DEBUG, "headrace.workers.compilations")
    caplog.clear()

    def watch(asked):
        late = engine.load_gauges()["compilations"]
        assert late == 0, (len(asked.prompt) // 4, asked.sampling, caplog.messages)

    run_mixed_load(engine, watch=watch)
    after = engine.load_gauges()
    assert after["compilations"] == 0
    assert after["graphs"] == ready["graphs"]
    assert after["preemptions"] > ready["preemptions"]
    assert (after["graph_replays"] > 100) is graphs


def test_nothing_is_compiled_for_heads_and_steps_as_large_as_real_ones(tmp_path, caplog, monkeypatch):
    """Attention of Hopper GPUs has heads of 128 values and many queries; steps of so many tokens are no graphs."""
    save_model(tmp_path, "llama", **WIDE)
    engine = load_engine(tmp_path, EngineConfig(**WIDE_CONFIG, dtype="bfloat16"))
    engine.warm_up()
    assert engine.load_gauges()["graphs"] > 0
    queries, on_hopper = [], attend_triton.attend_as_hopper

    def noted(q_thd, *args, **settings):
        queries.append(len(q_thd))
        on_hopper(q_thd, *args, **settings)

    monkeypatch.setattr(attend_triton, "attend_as_hopper", noted)
    with all_in_place(engine, caplog):
        assert serve_long_texts(engine, unit=1000) >= 3, "all steps were replayed"
        run_mixed_load(engine, requests=60)
    if torch.cuda.get_device_capability() == (9, 0):
        assert max(queries) > 2048


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_is_compiled_or_captured_once_an_encoder_is_ready(tmp_path, caplog, dtype):
    save_encoder(tmp_path, max_position_embeddings=600)
    engine = load_engine(tmp_path, EngineConfig(dtype=dtype, max_num_seqs=20, max_batch_tokens=4096))
    engine.warm_up()
    ready, steps = engine.load_gauges(), engine.steps
    assert ready["graphs"] > 0
    with all_in_place(engine, caplog):
        assert len(read_texts(engine)) == 150
    replays = engine.load_gauges()["graph_replays"] - ready["graph_replays"]
    assert 0 < replays < engine.steps - steps, "steps are both such as graphs compute, and larger"


def test_an_engine_holds_no_more_than_its_share(tmp_path):
    save_model(tmp_path, "llama", vocab_size=151_936, hidden_size=768, intermediate_size=3072, num_hidden_layers=6)
    torch.cuda.empty_cache()
    before, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    # Of other processes, more of which may begin while this runs, only PyTorch's own count is independent.
    torch.cuda.reset_peak_memory_stats()
    held = total - torch.cuda.mem_get_info()[0]
    share = held / total + 0.05
    config = EngineConfig(max_num_seqs=256, max_batch_tokens=4096, gpu_memory_utilization=share, max_model_len=512)
    engine = load_engine(tmp_path, config)
    engine.warm_up()
    for number in range(300):
        prompt = pack_tokens((number * 7 + place) % 1000 for place in range(100))
        sampling = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 20, "logprobs": 5, "ignore_eos": True}
        engine.add(Assignment(request=b"%d" % number, choice=0, attempt=0, prompt=prompt, sampling=sampling), 0.0)
    while engine.has_work:
        engine.step(0.0)
    own = torch.cuda.max_memory_reserved() - before
    assert own <= share * total
    assert engine.load_gauges()["kv_blocks_total"] > 100
