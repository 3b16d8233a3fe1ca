"""Where an engine computes: a setting made into a device of this machine, and numbers brought there and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.workers.layout import Layout, Part
from headrace.workers.memory import GpuMemory

__all__ = ["Download", "Parcel", "Upload", "captured", "gpu_memory", "pick_device", "upload", "upload_all"]

R = TypeVar("R")

_capturing = threading.Lock()  # a process captures one graph at a time


def pick_device(wanted: str) -> torch.device:
    """The device that a setting means: auto, cpu, cuda or cuda:N. A GPU becomes the current one of this process.

    Raises:
        ConfigError: there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(("cuda" if count else "cpu") if wanted == "auto" else wanted)
    if device.type == "cpu":
        return device
    index = device.index or 0
    if index >= count:
        has = f"{count} GPU{'s' if count != 1 else ''} that torch {torch.__version__} can use"
        raise ConfigError(
            f"device is {wanted!r}, but this machine has {has}. Give --device cpu or auto, or check the driver with "
            "nvidia-smi and that torch was built with CUDA.",
            param="device",
        )
    torch.cuda.set_device(index)  # kernels are launched on the current device
    return torch.device("cuda", index)


def gpu_memory(device: torch.device, utilization: float | None) -> GpuMemory:
    """A GPU's memory, with all that is in use as held; what torch keeps for later is not in use."""
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return GpuMemory(total=total, held=total - free - kept, utilization=utilization)


def upload(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Numbers on a device: those of a CPU share the array's memory, to a GPU they are copied without waiting."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # whose memory is kept until it was copied


def upload_all(arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> list[Tensor]:
    """Arrays of 32- or 64-bit integers on a device, brought there in one copy without waiting."""
    parcel = Parcel(device, *((array.dtype, array.shape) for array in arrays))
    for place, array in zip(parcel.arrays, arrays, strict=True):
        place[...] = array
    return parcel.send()


class Parcel:
    """Arrays that go to a device together, once, in one copy that nobody waits for.

    Args:
        device: where to.
        parts: type and shape of each.

    Attributes:
        arrays: to be written before they are sent.
    """

    def __init__(self, device: torch.device, *parts: Part) -> None:
        self._device = device
        self._layout = Layout(*parts)
        self._host = _host_memory(self._layout.size, device)
        self.arrays = self._layout.arrays(self._host.numpy())

    def send(self) -> list[Tensor]:
        """The arrays on the device; those of a CPU are the ones that were written."""
        # As in `upload`, nobody gets this memory of the host until it was copied.
        return self._layout.tensors(self._host.to(self._device, non_blocking=True))


def _host_memory(count: int, device: torch.device) -> Tensor:
    """Room for numbers of 64 bits, from where a device can copy them."""
    return torch.empty(count, dtype=torch.int64, pin_memory=device.type == "cuda")


class Upload:
    """Numbers on their way from the host to one place on a device, again and again, without waiting for the device.

    They are written in two places by turns: the device may do much before it comes to copy what was sent last.

    Args:
        target: [any] int64, where they go; what was given to the device before sees what was there before.
    """

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._pages = [_Page(target) for _ in range(2)]

    def room(self, count: int) -> np.ndarray[Any, Any]:
        """Where the first `count` numbers are to be written, once what was sent from there before is gone."""
        self._pages.reverse()
        return self._pages[0].room()[:count]

    def send(self, count: int) -> None:
        """Copy them to the device."""
        self._pages[0].send(self._target, count)


class _Page:
    """Memory of the host, and the event after which what was sent from it last has been copied."""

    def __init__(self, target: Tensor) -> None:
        self._host = _host_memory(len(target), target.device)
        self._values: np.ndarray[Any, Any] = self._host.numpy()
        self._gone: torch.cuda.Event | None = None

    def room(self) -> np.ndarray[Any, Any]:
        if self._gone is not None:
            self._gone.synchronize()
        return self._values

    def send(self, target: Tensor, count: int) -> None:
        target[:count].copy_(self._host[:count], non_blocking=True)
        if target.is_cuda:
            self._gone = self._gone or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._gone.record()


def captured(
    compute: Callable[[], R], pool: Any, prepared: Callable[[], AbstractContextManager[None]] = nullcontext
) -> tuple[torch.cuda.CUDAGraph, R]:
    """What is computed on a GPU as a graph, and its results, which every replay overwrites.

    Args:
        compute: must read and write the same memory each time, and wait for nothing.
        pool: of memory, which graphs that run one after the other may share; None makes one.
        prepared: surrounds a first call, which compiles and sets up whatever the captured one finds in place.
    """
    with _capturing:
        before, stream = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
        stream.wait_stream(before)
        with torch.cuda.stream(stream), prepared():
            compute()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the program may use the GPU meanwhile; what they do is no part of it, and no error.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                results = compute()
        finally:
            torch.cuda.set_stream(before)  # torch forgets to if the capture fails
        return graph, results


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """One for each GPU: libraries keep a workspace for every stream that they see."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class Download:
    """Tensors on their way from a device to the host, behind what the device was given to do so far.

    Those of a CPU are there already.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self._tensors = tensors
            return
        self._tensors = tuple(
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        )
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, on the host: this waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
