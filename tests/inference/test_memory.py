"""A model for which a GPU has no room is refused before it is read: on a CPU that claims to be one."""

from __future__ import annotations

import re

import pytest
import torch

from headrace.errors import ConfigError, ModelError
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.estimate import blank_model, weight_bytes
from headrace.workers.inference import init_inference, memory, sources
from headrace.workers.memory import GpuMemory
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import make_model, save_model

GPU = torch.device("cuda", 0)


class ReachedError(Exception):
    """It was let through."""


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with so many bytes free; whatever goes there ends the test."""

    def pretend(free, capability=(9, 0)):
        asked = []

        def free_now(device, utilization):
            asked.append((device, utilization))
            return GpuMemory(total=free + 1000, held=1000, utilization=utilization)

        monkeypatch.setattr(memory, "gpu_memory", free_now)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(sources, "_device", lambda config, parameter: GPU)
        monkeypatch.setattr(sources, "loading", reached)
        monkeypatch.setattr(sources, "inject", reached)
        return asked

    return pretend


def reached(*args, **kwargs):
    raise ReachedError


def weights_of(folder, dtype=torch.float32):
    return weight_bytes(blank_model(Checkpoint(folder).spec, dtype, None))


def test_what_does_not_fit_is_refused_before_it_is_read(tmp_path, gpu):
    save_model(tmp_path, "llama")
    asked = gpu(weights_of(tmp_path) // 3)
    with pytest.raises(ModelError) as caught:
        init_inference(tmp_path)
    assert asked == [(GPU, None)], "what is free now is what it may have"
    assert caught.value.param == "model"
    assert re.fullmatch(
        r"The LlamaForCausalLM does not fit on the GPU: weights 0\.00 GiB \+ a KV cache of 1 token 0\.00 GiB \+ the "
        r"largest step 0\.00 GiB = 0\.00 GiB, but 0\.00 GiB of its 0\.00 GiB are free\. What helps: .*device='cpu'\.",
        caught.value.message,
    )
    assert "--" not in caught.value.message


def test_what_fits_is_read(tmp_path, gpu):
    save_model(tmp_path, "llama")
    gpu(weights_of(tmp_path) + 100_000)
    with pytest.raises(ReachedError):
        init_inference(tmp_path)


def test_what_is_advised_fits(tmp_path, gpu):
    save_model(tmp_path, "llama")
    gpu(weights_of(tmp_path) * 6 // 10)
    with pytest.raises(ModelError, match=r"dtype='bfloat16', which needs half of it; quantize='int8', .*'fp8'"):
        init_inference(tmp_path)
    for settings in ({"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "fp8"}):
        with pytest.raises(ReachedError):
            init_inference(tmp_path, **settings)
    gpu(weights_of(tmp_path) * 6 // 10, capability=(8, 0))
    with pytest.raises(ModelError, match="quantize='int8'") as caught:
        init_inference(tmp_path)
    assert "fp8" not in caught.value.message


def test_a_setting_that_asks_for_too_much_is_named(tmp_path, gpu):
    save_model(tmp_path, "llama")
    gpu(weights_of(tmp_path) + 300_000)
    with pytest.raises(ConfigError, match=r"min_tokens=\d+ or less") as caught:
        init_inference(tmp_path, min_tokens=512)
    assert caught.value.param == "min_tokens"
    assert not isinstance(caught.value, ModelError)
    (advised,) = re.findall(r"min_tokens=(\d+) or", caught.value.message)
    assert 0 < int(advised) < 512
    with pytest.raises(ReachedError):
        init_inference(tmp_path, min_tokens=16)


def test_encoders_need_no_cache(tmp_path, gpu):
    save_encoder(tmp_path)
    gpu(weights_of(tmp_path) // 3)
    with pytest.raises(ModelError, match=r"BertForMaskedLM does not fit .* are free") as caught:
        init_inference(tmp_path)
    assert "KV cache" not in caught.value.message


def test_a_module_on_the_host_is_refused_and_left_as_it_was(tmp_path, gpu):
    module = make_model("llama")
    gpu(1000)
    with pytest.raises(ModelError, match="The LlamaForCausalLM does not fit on the GPU"):
        init_inference(module)
    assert module(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_module_that_is_on_the_gpu_takes_no_more_of_it(gpu, monkeypatch):
    asked = gpu(1000)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    with pytest.raises(ReachedError):
        init_inference(make_model("llama"))
    assert not asked


def test_a_cpu_is_not_asked(monkeypatch):
    monkeypatch.setattr(memory, "gpu_memory", lambda *args: pytest.fail("it was asked"))
    init_inference(make_model("llama"), device="cpu")


def test_memory_that_is_not_there(monkeypatch):
    monkeypatch.setattr("headrace.workers.inference.memory.available_bytes", lambda: 1000)
    with pytest.raises(
        ConfigError, match=r"100 tokens \(min_tokens\) need .* bytes of cache, but 1,000 are free on cpu"
    ):
        init_inference(make_model("llama"), device="cpu", min_tokens=100)
