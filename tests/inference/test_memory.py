"""Room on a device: what is said where there is none, and when."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import ConfigError, ModelError
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.inference import init_inference, memory, sources
from headrace.workers.inference.config import InferenceConfig
from headrace.workers.memory import GpuMemory
from tests.support.tiny_models import make_model


@pytest.mark.parametrize(
    ("share", "settings", "helps", "not_helpful"),
    [
        (0.7, {"dtype": "float32"}, "quantize='int8', with which they take 0.00 GiB; ", "ending"),
        (0.7, {"dtype": "float32"}, "dtype='bfloat16', with which they take 0.00 GiB; ", None),
        (0.1, {"dtype": "float32"}, "What helps: a larger GPU; device='cpu'.", "quantize"),
        (0.7, {"dtype": "float32", "quantize": "int8"}, "weights in int8 are", "quantize"),
    ],
)
def test_weights_that_a_gpu_has_no_room_for(folder, monkeypatch, share, settings, helps, not_helpful):
    """That is said before they are read, with what would help."""
    checkpoint, config = Checkpoint(folder), InferenceConfig(**settings)
    taken = memory._weight_bytes(checkpoint, torch.float32, config.quantize)
    monkeypatch.setattr(
        memory, "gpu_memory", lambda *_: GpuMemory(total=int(share * taken / 0.95), held=0, utilization=1.0)
    )
    with pytest.raises(ModelError, match=r"its weights in \w+ are 0\.00 GiB, but of 0\.00 GiB only") as caught:
        memory.check_weights(checkpoint, config, torch.device("cuda", 0))
    assert helps in caught.value.message
    assert not_helpful is None or not_helpful not in caught.value.message
    monkeypatch.setattr(memory, "gpu_memory", lambda *_: GpuMemory(total=2 * taken, held=0, utilization=1.0))
    memory.check_weights(checkpoint, config, torch.device("cuda", 0))


def test_weights_are_checked_before_they_are_read(folder, monkeypatch):
    def refuse(*_):
        raise ModelError("no room")

    monkeypatch.setattr(sources, "check_weights", refuse)
    monkeypatch.setattr(sources, "loading", lambda *args, **kwargs: pytest.fail("they were read"))
    with pytest.raises(ModelError, match="no room"):
        init_inference(folder, device="cpu")


def test_memory_that_is_not_there(monkeypatch):
    monkeypatch.setattr("headrace.workers.inference.memory.available_bytes", lambda: 1000)
    with pytest.raises(
        ConfigError, match=r"100 tokens \(min_tokens\) need .* bytes of cache, but 1,000 are free on cpu"
    ):
        init_inference(make_model("llama"), device="cpu", min_tokens=100)
