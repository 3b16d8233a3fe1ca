"""One process at a time works on a model in the cache; others wait and say for whom.

The lock is the kernel's (flock): it goes with its holder, however that dies. The file beside it stays, and holds the
id of the last process that had it, only to be named to others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from headrace.errors import ConfigError
from headrace.workers.models.progress import Progress

__all__ = ["locked"]

_LOOK_AGAIN = 0.5


@contextlib.contextmanager
def locked(path: Path, progress: Progress, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock, once whoever has it is done.

    Raises:
        ConfigError: it is taken and `wait` is False.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a+") as file:
        while not _try(file.fileno()):
            file.seek(0)
            holder = f"process {file.read(20).strip() or 'unknown'}"
            if not wait:
                raise ConfigError(f"{holder.capitalize()} is working on this model; wait for it, or end it.")
            progress(f"waiting for {holder}, which fetches the same model", 0, None)
            time.sleep(_LOOK_AGAIN)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
