"""Settings made into devices, on a machine that has what a test says it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.errors import ConfigError
from headrace.workers.device import Upload, pick_device, upload


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are some; returns what became the current one."""

    def pretend(count: int) -> list[int]:
        current: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return pretend


def test_auto_takes_the_first_gpu_if_there_is_one(gpus):
    gpus(0)
    assert pick_device("auto") == torch.device("cpu")
    current = gpus(2)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert current == [0]


def test_a_gpu_becomes_the_current_one(gpus):
    current = gpus(3)
    assert pick_device("cuda:2") == torch.device("cuda", 2)
    assert pick_device("cpu") == torch.device("cpu")
    assert current == [2]


@pytest.mark.parametrize(("wanted", "count"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_not_there_is_refused(gpus, wanted, count):
    gpus(count)
    with pytest.raises(ConfigError, match=f"has {count} GPU") as caught:
        pick_device(wanted)
    assert caught.value.param == "device"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_uploaded_arrives_whatever_becomes_of_the_array(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    arrays = [np.arange(size, dtype=kind) for size in (0, 1, 100_000) for kind in (np.int64, np.int32, np.float32)]
    for _ in range(20 if device == "cuda" else 1):
        uploaded = [upload(array.copy(), torch.device(device)) for array in arrays]
        for array, tensor in zip(arrays, uploaded, strict=True):
            assert tensor.device.type == device
            assert np.array_equal(tensor.cpu().numpy(), array)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_sent_to_a_fixed_place_is_not_overtaken_by_what_comes_next(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    target = torch.full((1_000_000,), -1, device=device)
    way, seen = Upload(target), []
    for turn in range(1, 20):
        count = len(target) // turn
        way.room(count)[:] = turn
        way.send(count)
        seen.append(target.clone())  # behind the copy, while the host goes on
    for turn, found in enumerate(seen, 1):
        count = len(target) // turn
        assert bool((found[:count] == turn).all())
        assert turn == 1 or bool((found[count:] < turn).all())
