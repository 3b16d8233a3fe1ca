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
from threading import Thread

from headrace.workers.memory import available_bytes

__all__ = ["begin_early", "read_ahead", "wake_gpu"]

_PIECE = 8 << 20
_PAGE = 4096
_THREADS = 4  # two are enough for most disks; those of a cloud want more requests at a time


def begin_early(folder: Path, device: str) -> None:
    """Start reading the weights of a folder, and waking the device of a setting; both in the background."""
    Thread(target=read_ahead, args=(sorted(folder.glob("*.safetensors")),), name="early-files", daemon=True).start()
    if device != "cpu":
        index = int((re.findall(r"\d+", device) or ["0"])[0])
        Thread(target=wake_gpu, args=(index,), name="early-gpu", daemon=True).start()


def read_ahead(files: Iterable[Path]) -> int:
    """Bring files into the page cache as far as they are not there; the bytes that were read.

    Those that are there cost one look at every few megabytes. Nothing is read where there is not twice the room.
    """
    with suppress(OSError, AttributeError):  # systems without such looks read when they must
        pieces = list(_missing(files))
        if sum(size for _, _, size in pieces) * 2 < available_bytes():
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="early-read") as threads:
                return sum(threads.map(lambda piece: _touch(*piece), pieces))
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


def _missing(files: Iterable[Path]) -> Iterator[tuple[Path, int, int]]:
    """Pieces of the files (file, first byte, size) whose first page is not in memory."""
    page = bytearray(_PAGE)
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, _PIECE):
                try:
                    os.preadv(file.fileno(), [page], start, os.RWF_NOWAIT)
                except BlockingIOError:
                    yield path, start, min(_PIECE, size - start)


def _touch(path: Path, start: int, size: int) -> int:
    with path.open("rb") as file:
        return os.preadv(file.fileno(), [bytearray(size)], start)
