"""What child processes of tests run, and how tests wait for processes. Importable by spawned children."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil

from headrace.errors import ModelFilesError
from headrace.processes import Child, Parent, parent

__all__ = [
    "LIMIT",
    "echo",
    "end_silently",
    "exit_with",
    "fail",
    "fail_unforeseen",
    "gone",
    "hang",
    "ignore_sigterm",
    "lose_kernel_help",
    "nest",
    "wait_until",
]

LIMIT = 60.0  # seconds; only a failure takes that long


def wait_until(condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(0.01)


def gone(pids: Iterable[int]) -> bool:
    """Whether none of the processes runs; zombies count as gone."""
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            pass
    return True


def _parent() -> Parent:
    link = parent()
    assert link is not None
    return link


def echo(**kwargs: object) -> None:
    """Say ready with the arguments, then send every message back until one says stop."""
    link = _parent()
    link.ready(pid=os.getpid(), **kwargs)
    while (message := link.receive()) and message["kind"] != "stop":
        link.send("echo", message=message)


def fail() -> None:
    """End with an error of our tree."""
    raise ModelFilesError("model.safetensors is 7 bytes short", param="folder")


def fail_unforeseen() -> None:
    """End with any other error."""
    raise ZeroDivisionError("one by nothing")


def end_silently() -> None:
    """End well, without a word."""


def exit_with(code: int) -> None:
    """End with a code."""
    raise SystemExit(code)


def ignore_sigterm() -> None:
    """Never end by itself, nor when asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _parent().ready()
    while True:
        time.sleep(60)


def hang() -> None:
    """Hang in C code with the interpreter's lock held: no thread of this process can run."""
    _parent().ready(pid=os.getpid())
    ctypes.PyDLL(None).sleep(600)


def lose_kernel_help() -> None:
    """Run without the parent-death signal, as on systems that have none."""
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    _parent().ready(pid=os.getpid())
    time.sleep(600)


def nest(kinds: list[str]) -> None:
    """Start a child for each kind, say ready with the process ids of all, then wait."""
    targets = {"hang": hang, "lose_kernel_help": lose_kernel_help, "echo": echo}
    children = [Child(kind, targets[kind]).start() for kind in kinds]
    pids = [child.wait_ready(LIMIT)["pid"] for child in children]
    _parent().ready(pids=[os.getpid(), *pids])
    time.sleep(600)
