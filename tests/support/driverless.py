"""A driver for Triton without a GPU: kernels are compiled for an H200, loaded and launched, but nothing runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

__all__ = ["Driverless", "driverless"]


class Driverless:
    """What Triton asks of a driver.

    Attributes:
        loaded: names of the kernels that were loaded, and of the threads that did it.
        launched: names of the kernels that were launched.
        most_threads: of a program; kernels that need more cannot be loaded.
    """

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []
        self.launched: list[str] = []
        self.most_threads = 1024
        self.utils = self
        self.launcher_cls = self._launcher

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """An H200."""
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """As far as loading looks at them."""
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, *_: Any) -> tuple[None, int, int, int, int]:
        """A module that need not be unloaded, function, registers, spills, and threads of a program."""
        self.loaded.append((name, threading.current_thread().name))
        return None, 1, 0, 0, self.most_threads

    def _launcher(self, source: Any, metadata: Any) -> Any:
        return lambda *_: self.launched.append(metadata.name)


@contextmanager
def driverless(folder: str) -> Iterator[Driverless]:
    """Compile, and keep what was compiled in a folder; not for a process that interprets kernels."""
    made = Driverless()
    with triton.knobs.runtime.scope(), triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        before = driver._active
        driver.set_active(made)
        try:
            yield made
        finally:
            driver._active = before
