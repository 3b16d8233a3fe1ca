"""Compiles with many threads what coming steps launch, of which each launch would compile its own while all wait.

The steps are called as they will be (`headrace.workers.rehearsal`), only that a launch tells Triton what to compile
instead of running. When all is known, threads compile it and load it on the GPU: nine tenths of the work are MLIR,
LLVM, ptxas and a C compiler, which need no lock of Python's. Kernels come to stand where their launches look for them,
by the same keys, so the steps themselves compile nothing, and nothing is compiled that they would not have compiled.

What fails here is left: its launch compiles it again and fails as it always did. A Triton that cannot be asked compiles
at each launch.
"""

# Light to import: ranks tell what was compiled without knowing torch.
from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from threading import Thread, get_ident
from typing import TYPE_CHECKING, Any

from headrace.workers.rank_threads import cores

if TYPE_CHECKING:
    import torch

__all__ = ["Ahead", "compile_ahead", "compiled_ahead", "prepare"]

_MOST_THREADS = 16  # the tenth of the work that does hold Python's lock keeps more from being of use


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What was compiled ahead.

    Attributes:
        seconds: that it took, rehearsals included.
        kernels: that were compiled; those that an earlier start had kept are not counted.
        threads: that compiled them; 0 if there was nothing.
    """

    seconds: float = 0.0
    kernels: int = 0
    threads: int = 0


_total = Ahead()
_preparing: Thread | None = None


def prepare() -> None:
    """Begin with what is needed once, in the background: Triton's import, and a hash of all that Triton is, which is a
    part of every kernel's key: half a gigabyte is read for it, a third of a second without Python's lock."""
    global _preparing
    if _preparing is None:
        _preparing = Thread(target=_make_keys, name="compile-keys", daemon=True)
        _preparing.start()


def _make_keys() -> None:
    with suppress(Exception):  # who needs it meets it again, and says so
        import triton  # noqa: F401

        try:
            from triton.runtime.cache import triton_key
        except ImportError:  # before 3.5
            from triton.compiler.compiler import triton_key
        triton_key()


def compiled_ahead() -> Ahead:
    """All that this process has compiled ahead so far."""
    return _total


def compile_ahead(rehearse: Callable[[], None], device: torch.device) -> int:
    """Compile and load whatever a function launches; no kernel of Triton's runs.

    Args:
        rehearse: is called once. What it launches leaves results as they are.
        device: of the launches.

    Returns:
        how many kernels were compiled. 0 if an earlier start had kept them all.
    """
    global _total
    began = time.monotonic()
    if _preparing is not None:
        _preparing.join()
    tasks = _Tasks()
    mode = _asynchronous(tasks)
    if mode is None:
        return 0
    threads = min(_MOST_THREADS, cores())
    # Triton silences warnings while it parses; threads that do so at once would leave them silenced.
    with _compilations() as compiled, warnings.catch_warnings():
        # The mode belongs to a context, so it ends with this one, whatever happens.
        copy_context().run(_compile, mode, rehearse, tasks, threads, device)
    _total = Ahead(
        seconds=_total.seconds + time.monotonic() - began,
        kernels=_total.kernels + len(compiled),
        threads=max(_total.threads, min(threads, len(compiled))),
    )
    return len(compiled)


def _asynchronous(tasks: _Tasks) -> Any:
    """Triton's mode in which compilations become tasks; None if it has none, or interprets its kernels."""
    from triton import knobs

    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return None
    return None if knobs.runtime.interpret else AsyncCompileMode(tasks, ignore_errors=True)


def _compile(mode: Any, rehearse: Callable[[], None], tasks: _Tasks, threads: int, device: torch.device) -> None:
    with mode:
        try:
            with _launches_only_compile():
                rehearse()
            tasks.run(threads, device)
        finally:
            tasks.give_up()  # or the mode would wait for them


@contextmanager
def _launches_only_compile() -> Iterator[None]:
    """This thread's launches ask for a kernel and do not run it; of those that are alike, the first."""
    from triton.runtime.jit import JITFunction

    launch, thread = JITFunction.run, get_ident()
    asked = set()

    def ask(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if get_ident() != thread:
            return launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        # Finer than Triton's own key, which takes much longer to make.
        key = (id(kernel), tuple(map(_traits, args)), tuple((name, _traits(value)) for name, value in kwargs.items()))
        if key not in asked:
            asked.add(key)
            launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        return None

    JITFunction.run = ask
    try:
        yield
    finally:
        JITFunction.run = launch


def _traits(value: Any) -> Any:
    """All of an argument that a kernel may be compiled for."""
    if hasattr(value, "data_ptr"):
        return value.dtype, value.data_ptr() % 16
    if hasattr(value, "block_shape"):  # a tensor as the hardware copies it, whose size makes no difference
        return _traits(value.base), tuple(value.block_shape), repr(getattr(value, "layout", None))
    if isinstance(value, tuple):
        return tuple(map(_traits, value))
    return type(value), value


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Names of the kernels that are compiled, not those that were kept."""
    from triton import knobs

    before, compiled = knobs.compilation.listener, []

    def listen(**told: Any) -> None:
        if not told["cache_hit"]:
            compiled.append(told["src"].name)
        if before is not None:
            before(**told)

    knobs.compilation.listener = listen
    try:
        yield compiled
    finally:
        knobs.compilation.listener = before


class _Tasks(Executor):
    """Compilations, which wait until all are known: threads that parse would keep the one that rehearses from its
    lock, milliseconds at each operation."""

    def __init__(self) -> None:
        self._tasks: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep a task that compiles a kernel; the future is of the kernel, loaded."""
        future: Future[Any] = Future()
        self._tasks.append((future, partial(task, *args, **kwargs)))
        return future

    def run(self, threads: int, device: torch.device) -> None:
        """Do all tasks; the threads are gone afterwards."""
        if not self._tasks:
            return
        count = min(threads, len(self._tasks))
        pool = ThreadPoolExecutor(count, "compile", initializer=_use, initargs=(device,))
        try:
            wait([pool.submit(_fulfil, future, task) for future, task in self._tasks])
        finally:
            pool.shutdown(cancel_futures=True)

    def give_up(self) -> None:
        """Whatever was not done fails, so that nobody waits for it."""
        for future, _ in self._tasks:
            if not future.done():
                future.set_exception(CancelledError())


def _fulfil(future: Future[Any], task: Callable[[], Any]) -> None:
    try:
        kernel = task()
        kernel._init_handles()  # as its first launch does: with Triton 3.6 that is a C compiler for each signature
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(kernel)


def _use(device: torch.device) -> None:
    """A thread begins on the first GPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
