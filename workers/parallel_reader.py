"""Reads the tensors of a checkpoint onto a device with several threads, ahead of whoever asks for them.

    files -> pinned buffers, two a thread -> one tensor's memory on the device -> the parameter it is a part of

Threads read pieces of a few megabytes through the page cache, for a start usually finds the files there, and send them
on without waiting. What is under way at one time is bounded on both sides: on the host by the buffers, on the device by
`_AHEAD` bytes, or by one tensor if that is larger. Casts and layouts are left to the reader's user, on the device.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from headrace.errors import ModelFilesError
from headrace.workers.checkpoint import Place

__all__ = ["ParallelReader"]

_THREADS = 8  # one copies 5 to 10 GB/s out of the page cache, a PCIe 5 link takes 50
_PIECE = 8 << 20
_AHEAD = 1 << 30


class ParallelReader:
    """Tensors in the order in which they will be asked for.

    Args:
        places: of all tensors.
        order: names of those that will be read, one after the other; a name may come twice.
        device: where they go.
    """

    def __init__(self, places: Mapping[str, Place], order: Sequence[str], device: torch.device) -> None:
        self._places = places
        self._order = order
        # With its number: without one it is another for each thread.
        self._device = device = torch.empty(0, device=device).device
        self._next = 0  # of the order, to be started
        self._under_way: deque[tuple[str, Tensor, list[Future[_Event]]]] = deque()
        self._ahead = 0  # bytes under way
        self._files = _Files()
        self._lane = _GpuLanes(device).lane if device.type == "cuda" else _read_into
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")

    def read(self, name: str) -> Tensor:
        """The next tensor of the order, on the device; work of the current stream finds it complete.

        Raises:
            ModelFilesError: its file ended too early, or cannot be read.
        """
        self._start_more()
        expected, raw, pieces = self._under_way.popleft()
        assert name == expected, f"{name} was asked for before {expected}"
        for piece in pieces:
            piece.result()()
        self._ahead -= raw.numel()
        place = self._places[name]
        values = raw.view(place.dtype)
        return values.view(place.shape) if values.numel() == math.prod(place.shape) else values  # packed: bytes

    def close(self) -> None:
        """Stop reading, and give the memory back."""
        self._threads.shutdown(cancel_futures=True)
        self._files.close()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies may still be under way
        self._under_way.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _start_more(self) -> None:
        """Begin to read the next tensors, as many as may be under way; one at least."""
        while self._next < len(self._order):
            place = self._places[self._order[self._next]]
            if self._under_way and self._ahead + place.num_bytes > _AHEAD:
                return
            raw = torch.empty(place.num_bytes, dtype=torch.uint8, device=self._device)
            self._under_way.append((self._order[self._next], raw, self._submit(place, raw)))
            self._ahead += place.num_bytes
            self._next += 1

    def _submit(self, place: Place, raw: Tensor) -> list[Future[_Event]]:
        allocated = _now(self._device)
        fill = self._files.reader(place.path)
        return [
            self._threads.submit(self._lane, fill, place.start + start, raw[start : start + _PIECE], allocated)
            for start in range(0, place.num_bytes, _PIECE)
        ]


_Event = Callable[[], None]  # makes the current stream wait for it
_Fill = Callable[[Tensor, int], None]  # fills memory of the host with what begins at a byte of a file


def _nothing() -> None:
    pass


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _now(device: torch.device) -> torch.cuda.Event | None:
    """What the memory that was just allocated was used for before is over at this event."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _read_into(fill: _Fill, start: int, out: Tensor, allocated: torch.cuda.Event | None) -> _Event:
    """A piece straight to where it stays: memory of the host."""
    fill(out, start)
    return _nothing


class _GpuLanes:
    """The road from a file to a GPU: each thread has a stream and two pinned buffers, of which one fills while the
    other empties."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    def lane(self, fill: _Fill, start: int, out: Tensor, allocated: torch.cuda.Event | None) -> _Event:
        """Read a piece, and start its copy."""
        assert allocated is not None
        stream, buffers = self._of_this_thread()
        buffer, emptied = buffers[0]
        emptied.synchronize()
        fill(buffer[: len(out)], start)
        # Whether tensors are inference tensors, which change in inference mode alone, is up to who asked for them.
        with torch.inference_mode(), torch.cuda.stream(stream):
            stream.wait_event(allocated)
            out.copy_(buffer[: len(out)], non_blocking=True)
            emptied.record(stream)
            arrived = stream.record_event()
        buffers.rotate()
        return lambda: torch.cuda.current_stream(self._device).wait_event(arrived)

    def _of_this_thread(self) -> tuple[torch.cuda.Stream, deque[tuple[Tensor, torch.cuda.Event]]]:
        own = self._own
        if not hasattr(own, "stream"):
            torch.cuda.set_device(self._device)  # a thread begins on the first GPU, and would claim memory there
            own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            own.buffers = deque((torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True), _event()) for _ in range(2))
        return own.stream, own.buffers


class _Files(ExitStack):
    """Open files, each opened once."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, int] = {}

    def reader(self, path: Path) -> _Fill:
        """What fills memory from a file.

        Raises:
            ModelFilesError: it cannot be opened.
        """
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _unreadable(path, error.strerror) from error
            self.callback(os.close, self._open[path])
        return lambda out, start: _fill(self._open[path], path, out, start)


def _fill(file: int, path: Path, out: Tensor, start: int) -> None:
    memory = memoryview(out.numpy().data)
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file, [memory[done:]], start + done)
        except OSError as error:
            raise _unreadable(path, error.strerror) from error
        if not count:
            raise _unreadable(path, f"it ends at byte {start + done:,}, before the tensors that its header names")
        done += count


def _unreadable(path: Path, why: str | None) -> ModelFilesError:
    return ModelFilesError(
        f"The weights file {str(path)!r} could not be read to its end: {why}. If something writes to it, wait until "
        "that is done; otherwise check the disk, and fetch the model again.",
        param="model",
    )
