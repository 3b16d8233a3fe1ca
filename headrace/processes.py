"""Child processes that never outlive their parent, and the pipe between the two. Knows no task; imports nothing heavy.

    parent                                  child
    Child.start, terminate, kill   ──►      dies with its parent, hears no terminal, has a name, logs to stderr
    Child.receive, wait_ready      ◄──      parent().ready, parent().send, and the error that ended it
    Child.send                     ──►      parent().receive

Children are spawned, never forked: by the spawn context that torch.multiprocessing shares with the standard library.
Messages are msgpack maps; objects of ours are not pickled, except that spawning names the function to call.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from headrace.errors import HeadraceError, InternalError, from_wire

__all__ = ["Child", "Parent", "describe_exit", "die_with_parent", "parent"]

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # Ctrl-C and a closed window reach everybody; the parent decides for all
_LAST_WORDS = 2.0  # seconds that children have to end when their parent does so in good order

_spawn = multiprocessing.get_context("spawn")
_living: dict[int, Child] = {}  # by process id; also keeps their pipes open, whose end would mean that we are gone


def die_with_parent() -> None:
    """Kill this process as soon as its parent is gone, however that ended. A `Child` has done it already.

    On Linux the kernel does it, even to a process that hangs. Everywhere a thread waits for the end of a pipe that only
    the parent holds, or, in a process that was not spawned by multiprocessing, looks who the parent is.
    """
    spawner = multiprocessing.parent_process()
    ours = os.getppid() if spawner is None or spawner.pid is None else spawner.pid
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != ours:
        _die()  # it went before the kernel knew what we want
    threading.Thread(target=_watch, args=(ours,), name="parent-watch", daemon=True).start()


def _watch(pid: int) -> None:
    spawner = multiprocessing.parent_process()
    if spawner is not None:
        spawner.join()
    while os.getppid() == pid:
        time.sleep(0.2)
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, value: object) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library; the thread watches all the same
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class Parent:
    """The child's end of the pipe. Sending is safe from any thread."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """To poll for messages."""
        return self._pipe.fileno()

    def send(self, kind: str, **fields: Any) -> None:
        """Tell the parent something; if it is gone, so is this process soon."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send_bytes(_pack({"kind": kind, **fields}))

    def ready(self, **fields: Any) -> None:
        """The child does what it was started for."""
        self.send("ready", **fields)

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None if none came in time (None: wait for ever)."""
        return _receive(self._pipe, timeout)


_parent: Parent | None = None


def parent() -> Parent | None:
    """The pipe to the parent, in a process started by `Child`; None in others."""
    return _parent


class Child:
    """A process that runs `target(**kwargs)` and ends with this one.

    Args:
        name: for logs, `ps` and `top`.
        target: a function at the top of a module.
        kwargs: plain values and ends of pipes.
    """

    def __init__(self, name: str, target: Callable[..., None], kwargs: Mapping[str, Any] | None = None) -> None:
        assert "<" not in target.__qualname__, "the child must be able to import its function"
        self.name = name
        self.error: HeadraceError | None = None  # that it reported; known once `receive` met it
        self._pipe, theirs = _spawn.Pipe()
        self._theirs = theirs
        self._closed = False
        # Not a daemon: those may have no children of their own.
        self._process = _spawn.Process(
            target=_main, args=(name, theirs, target, dict(kwargs or {})), name=name, daemon=False
        )

    def __repr__(self) -> str:
        state = "new" if self.pid is None else "alive" if self.alive else describe_exit(self.exitcode)
        return f"<Child {self.name} {self.pid or ''}: {state}>"

    def __enter__(self) -> Child:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def start(self) -> Child:
        """Start it.

        Raises:
            OSError: the system has no room for another process.
        """
        _need_starter()
        job = _Job(self)
        _jobs.put(job)
        job.done.wait()
        self._theirs.close()  # the pipe must end with the child
        if job.error is not None:
            raise job.error
        return self

    # ------------------------------------------------------------------------------------------------ its life

    @property
    def pid(self) -> int | None:
        """Its process id, once started."""
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """A handle that becomes readable when it ends, for `multiprocessing.connection.wait`."""
        return self._process.sentinel

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.pid is not None and self._process.is_alive()

    @property
    def exitcode(self) -> int | None:
        """How it ended: its exit code, or minus the signal; None before."""
        return self._process.exitcode

    def join(self, timeout: float | None = None) -> int | None:
        """Wait until it has ended; its exit code, None if it runs on."""
        self._process.join(timeout)
        if self._process.exitcode is not None:
            _living.pop(self._process.pid or 0, None)
        return self._process.exitcode

    def terminate(self, grace: float = 5.0) -> int | None:
        """Ask it to end (SIGTERM), make it end after `grace` seconds (SIGKILL); its exit code."""
        if self.alive:
            self._process.terminate()
            if self.join(grace) is None:
                self.kill()
        return None if self.pid is None else self.join()

    def kill(self) -> None:
        """End it now; `join` waits for it."""
        if self.alive:
            self._process.kill()

    # ----------------------------------------------------------------------------------------------- the pipe

    @property
    def pipe(self) -> Connection:
        """To wait for messages with `multiprocessing.connection.wait`, together with sentinels."""
        return self._pipe

    @property
    def closed(self) -> bool:
        """Whether nothing more will come: it ended, and all it said was received."""
        return self._closed

    def send(self, kind: str, **fields: Any) -> None:
        """Tell it something; if it is gone, nobody hears it."""
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(_pack({"kind": kind, **fields}))

    def receive(self, timeout: float | None = 0.0) -> dict[str, Any] | None:
        """The next message, None if none came in time. An error that ended it is also kept in `error`."""
        if self._closed:
            return None
        try:
            message = _receive(self._pipe, timeout)
        except (EOFError, OSError):  # the latter if it ended without reading what it was told
            self._closed = True
            return None
        if message is not None and message["kind"] == "error":
            self.error = from_wire(message["error"])
        return message

    def wait_ready(self, timeout: float) -> dict[str, Any]:
        """Wait until it says that it is ready; what it said.

        Raises:
            HeadraceError: the error that ended it, or none: it ended without a word, or took too long.
        """
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0 and not self._closed:
            message = self.receive(left)
            if self.error is not None:
                raise self.error
            if message is not None and message["kind"] == "ready":
                return message
        if self._closed:
            raise InternalError(f"The process {self.name!r} {describe_exit(self.join(5.0))} before it was ready.")
        raise InternalError(f"The process {self.name!r} was not ready after {timeout:.0f} s.")


def describe_exit(code: int | None) -> str:
    """An exit code in words, to follow the name of the process."""
    if code is None:
        return "runs"
    if code >= 0:
        return f"ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    hint = " (by hand, or because memory ran out)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"


# ------------------------------------------------------------------------------------------------------- the parent


class _Job:
    """A child to start."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.done = threading.Event()
        self.error: BaseException | None = None


_jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
_starting = threading.Lock()
_starter: threading.Thread | None = None


def _need_starter() -> None:
    """Start the thread that starts children and never ends: Linux takes its death for the death of the parent."""
    global _starter
    with _starting:
        if _starter is None:
            atexit.register(_end_children)
            _starter = threading.Thread(target=_serve_jobs, name="process-starter", daemon=True)
            _starter.start()


def _serve_jobs() -> None:
    multiprocessing.resource_tracker.ensure_running()  # its start unblocks Ctrl-C
    # Inherited: a Ctrl-C while the child is still importing must not end it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL)
    while True:
        job = _jobs.get()
        try:
            job.child._process.start()
            _living[job.child.pid or 0] = job.child
        except BaseException as error:
            job.error = error  # raised again where it was started
        job.done.set()


def _end_children() -> None:
    """End what still runs when this process ends in good order; otherwise it would wait for them."""
    children = list(_living.values())
    for child in children:
        with contextlib.suppress(OSError):
            child._process.terminate()
    deadline = time.monotonic() + _LAST_WORDS
    for child in children:
        child.terminate(max(0.0, deadline - time.monotonic()))


# -------------------------------------------------------------------------------------------------------- the child


def _main(name: str, pipe: Connection, target: Callable[..., None], kwargs: dict[str, Any]) -> None:
    """What every child runs."""
    global _parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear, and so is a closed terminal
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    die_with_parent()
    _set_up_logging()
    if sys.platform == "linux":
        _prctl(_PR_SET_NAME, name.encode()[:15])
    _parent = Parent(pipe)
    try:
        target(**kwargs)
    except HeadraceError as error:
        logger.debug("%s ends", name, exc_info=True)
        _fail(_parent, error)
    except Exception as error:
        logger.exception("%s failed", name)
        _fail(_parent, InternalError(f"{name} failed: {type(error).__name__}: {error}. Its log has the traceback."))
    finally:
        _end_children()


def _fail(link: Parent, error: HeadraceError) -> None:
    link.send("error", error=error.to_wire())
    raise SystemExit(1)


def _set_up_logging() -> None:
    form = "%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    if os.environ.get("HEADRACE_DEBUG"):
        logging.getLogger("headrace").setLevel(logging.DEBUG)


def _pack(message: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed


def _receive(pipe: Connection, timeout: float | None) -> dict[str, Any] | None:
    if not pipe.poll(timeout):
        return None
    message = msgpack.unpackb(pipe.recv_bytes())
    assert isinstance(message, dict)
    return message
