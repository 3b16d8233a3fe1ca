"""One `headrace up` per runtime folder: a lock with a note of who holds it, for whoever comes second."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headrace.addresses import runtime_dir
from headrace.errors import AddressError, ConfigError

__all__ = ["Note", "sole_pool"]


class Note:
    """What the holder of the lock says about itself."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._facts: dict[str, Any] = {"pid": os.getpid()}
        self.add()

    def add(self, **facts: Any) -> None:
        """Say more."""
        self._facts |= facts
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(self._facts).encode(), 0)


@contextmanager
def sole_pool() -> Iterator[Note]:
    """Hold the lock.

    Raises:
        AddressError: another one runs; says which, and what can be done.
        ConfigError: the runtime folder cannot be used.
    """
    try:
        path = runtime_dir() / "up.lock"
        # Closed on exec: children must not hold the lock when this process is gone.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"The runtime folder cannot be used: {error}. Set HEADRACE_RUNTIME_DIR to a folder of your own."
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AddressError(_who(fd)) from error
        yield Note(fd)
    finally:
        os.close(fd)


def _who(fd: int) -> str:
    facts: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        facts = json.loads(os.pread(fd, 4096, 0))
    words = [f"process {facts.get('pid', 'unknown')}"]
    words += [f"{name} {facts[name]}" for name in ("model", "page") if name in facts]
    return (
        f"`headrace up` runs already ({', '.join(words)}). Use that one, end it with Ctrl-C in its terminal, or run a "
        "second one beside it: HEADRACE_RUNTIME_DIR=/another/folder headrace up --port 8001"
    )
