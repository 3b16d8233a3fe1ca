"""What can begin before anything heavy is imported: files come into memory and the GPU wakes while Python imports.

Both only make ready what comes later anyway. Where one cannot be done, nothing is said: who needs it will say why.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread, local
from typing import NamedTuple

from headrace.workers.memory import available_bytes
from headrace.workers.samples import SAMPLE_BYTES, sample_places

__all__ = ["begin_early", "read_ahead", "wake_gpu"]

_PIECE = 8 << 20
_PAGE = 4096
_HEADER = 1 << 20  # of a file of weights: that of a large one has some hundred kilobytes
_THREADS = 4  # two are enough for most disks; those of a cloud want more requests at a time


def begin_early(folder: Path, device: str) -> None:
    """Start reading the weights of a folder, and waking the device of a setting; both in the background."""
    Thread(target=read_ahead, args=(sorted(folder.glob("*.safetensors")),), name="early-files", daemon=True).start()
    if device != "cpu":
        index = int((re.findall(r"\d+", device) or ["0"])[0])
        Thread(target=wake_gpu, args=(index,), name="early-gpu", daemon=True).start()


def read_ahead(files: Iterable[Path]) -> int:
    """Bring files into the page cache as far as they are not there; the bytes that were read.

    What a start looks at first comes first: headers, and the samples of the fingerprint. Of what is there, every few
    megabytes cost one look. Nothing is read where there is not twice the room.
    """
    files = list(files)
    with suppress(OSError, AttributeError):  # systems without such looks read when they must
        pieces = list(_missing(files))
        if pieces and sum(size for _, _, size in pieces) * 2 < available_bytes():
            read = _Reader().read
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="early-read") as threads:
                list(threads.map(read, _first(files)))
                return sum(threads.map(read, pieces))
    return 0


def wake_gpu(index: int) -> bool:
    """Let the driver make the context of a GPU that torch will use, as torch would do it later; whether it did."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    ready: bool = (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )
    return ready


def _missing(files: Iterable[Path]) -> Iterator[_Piece]:
    """Pieces of the files whose first page is not in memory."""
    page = bytearray(_PAGE)
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, _PIECE):
                try:
                    os.preadv(file.fileno(), [page], start, os.RWF_NOWAIT)
                except BlockingIOError:
                    yield _Piece(path, start, min(_PIECE, size - start))


def _first(files: Iterable[Path]) -> Iterator[_Piece]:
    """What is looked at before any weight is read."""
    for path in files:
        size = path.stat().st_size
        yield _Piece(path, 0, min(_HEADER, size))
        for start in sample_places(size):
            yield _Piece(path, start, min(SAMPLE_BYTES, size))


class _Piece(NamedTuple):
    """A part of a file."""

    path: Path
    start: int
    size: int


class _Reader:
    """Reads pieces to nowhere. Each thread has memory of its own for that: to make it anew for every piece would keep
    Python's lock from those who import meanwhile, milliseconds each time."""

    def __init__(self) -> None:
        self._own = local()

    def read(self, piece: _Piece) -> int:
        """Bring a piece into memory; its bytes."""
        if not hasattr(self._own, "memory"):
            self._own.memory = memoryview(bytearray(_PIECE))
        with piece.path.open("rb") as file:
            return os.preadv(file.fileno(), [self._own.memory[: piece.size]], piece.start)
