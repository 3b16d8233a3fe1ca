"""Settings made into devices, on a machine that has what a test says it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.errors import ConfigError
from headrace.workers.device import Upload, pick_device, upload, upload_all


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_arrays_arrive_together_whatever_is_uploaded_next(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    turns = [
        [np.full(100_001, turn), np.full((3, 33), -turn, np.int32), np.empty(0, np.int64), np.full(1, turn, np.int32)]
        for turn in range(20)
    ]
    uploaded = [upload_all([array.copy() for array in arrays], torch.device(device)) for arrays in turns]
    for arrays, tensors in zip(turns, uploaded, strict=True):
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.device.type == device
            assert tensor.data_ptr() % 16 == 0 or not tensor.numel()
            assert np.array_equal(tensor.cpu().numpy(), array)


class BusyGpu:
    """A target on a GPU that does what it was given only when somebody waits for it, and all that comes before."""

    is_cuda = True

    def __init__(self, count: int) -> None:
        self.values = torch.full((count,), -1)
        self.shape, self.dtype, self.device = self.values.shape, self.values.dtype, self.values.device
        self.waits: list[int] = []  # for which copies
        self.seen: list[torch.Tensor] = []  # after each copy
        self._given: list[tuple[int, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> BusyGpu:
        self._stop = part.stop
        return self

    def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self._given.append((self._stop, source))

    def finish(self, count: int) -> None:
        while len(self.seen) < count:
            stop, source = self._given[len(self.seen)]
            self.values[:stop] = source
            self.seen.append(self.values.clone())

    def event(self) -> BusyGpu.Event:
        return BusyGpu.Event(self)

    class Event:
        def __init__(self, gpu: BusyGpu) -> None:
            self._gpu = gpu

        def record(self) -> None:
            self._after = len(self._gpu._given)

        def synchronize(self) -> None:
            self._gpu.waits.append(self._after)
            self._gpu.finish(self._after)


def test_what_is_on_its_way_is_not_written_over(monkeypatch):
    """However late the GPU copies; and nobody waits for the copy that was given to it last."""
    gpu = BusyGpu(4)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    way = Upload(gpu)
    for turn in range(5):
        way.room(1 + turn % 4)[:] = turn
        way.send(1 + turn % 4)
    assert gpu.waits == [1, 2, 3], "before a place is written for the second time"
    gpu.finish(5)
    assert [seen.tolist() for seen in gpu.seen] == [
        [0, -1, -1, -1],
        [1, 1, -1, -1],
        [2, 2, 2, -1],
        [3, 3, 3, 3],
        [4, 3, 3, 3],
    ]
