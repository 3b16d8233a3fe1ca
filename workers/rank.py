"""What one process of a group runs: load the engine, warm it up, then lead or follow.

    rank -> launcher   loading(done, total)  warming  warm(phases)  error  |  leader: waiting  ready  beat(step, busy)
    launcher -> rank   serve, once all ranks are warm  |  leader: drain(grace)

torch is imported here and nowhere before, after the number of threads is settled.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from headrace.addresses import cache_dir
from headrace.errors import ConfigError
from headrace.processes import Parent, parent
from headrace.workers.early import begin_early
from headrace.workers.group import ENGINE, GroupSpec
from headrace.workers.leader_loop import LeaderLoop
from headrace.workers.parallel_compile import compiled_ahead
from headrace.workers.plan import PlanWriter, follow
from headrace.workers.rank_threads import time_awake, use_threads
from headrace.workers.start_report import Phase, StartClock

__all__ = ["run_rank"]

logger = logging.getLogger(__name__)

_PROGRESS_EVERY = 0.1  # seconds between two words about loading


def run_rank(
    *,
    spec: dict[str, Any],
    rank: int,
    threads: int,
    crowded: bool,
    endpoint: str,
    began: float | None = None,
    followers: Sequence[Connection] = (),
    leader: Connection | None = None,
) -> None:
    """Be rank `rank` of a group until it is drained.

    Args:
        spec: of the group, `GroupSpec.to_wire()`.
        rank: 0 leads.
        threads: CPU threads to compute with.
        crowded: whether other processes need the same cores.
        endpoint: of the broker's face for workers.
        began: when the launcher started this process, in monotonic seconds.
        followers: the plan's pipes, if this is the leader.
        leader: the plan's pipe, if this is a follower.
    """
    launcher = parent()
    assert launcher is not None, "ranks are started by a launcher"
    use_threads(threads, crowded=crowded)
    keep_kernels()
    clock = StartClock(began)
    group = GroupSpec.from_wire(spec)
    if group.engine == ENGINE:
        begin_early(group.folder, group.config.device)
    engine = _load(group, launcher, clock)
    launcher.send("warming")
    _warm_up(engine, clock)
    # What is there now stays; the collector need not look at it again while tokens wait.
    gc.collect()
    gc.freeze()
    launcher.send("warm", phases=clock.report().to_wire())
    if leader is not None:
        follow(engine, leader)
        return
    while (message := launcher.receive()) is None or message["kind"] != "serve":
        if message is not None and message["kind"] == "drain":
            return
    writer = PlanWriter(followers)
    loop = LeaderLoop(
        engine, endpoint, group.name, launcher=launcher, writer=writer, awake=time_awake(group.config.device)
    )
    signal.signal(signal.SIGTERM, loop.on_sigterm)
    loop.run()


def keep_kernels() -> None:
    """Let Triton keep what it compiles where our models are, so that a later start compiles nothing. Several processes
    may do so at once: Triton puts complete files there."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))


def _load(group: GroupSpec, launcher: Parent, clock: StartClock) -> Any:
    """The group's engine; says how far it is, several times a second at most."""
    told_at = 0.0
    reading = True

    def progress(done: int, total: int) -> None:
        nonlocal told_at, reading
        now = time.monotonic()
        if done == 0:
            clock.end("model")
        elif done >= total and reading:
            reading = False
            _end(clock, "weights", total)
        if now - told_at >= _PROGRESS_EVERY or done >= total:
            told_at = now
            launcher.send("loading", done=done, total=total)

    launcher.send("loading", done=0, total=0)
    try:
        with _uncollected():
            load = _imported(group.engine)
        clock.end("imports")
        engine = load(Path(group.folder), group.config, name=group.model_name, progress=progress)
        _end(clock, "memory", engine.kv_tokens)
        return engine
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "headrace":
            raise
        raise ConfigError(
            f"Serving needs the package {error.name!r}, which is not installed; "
            'install what is missing with:  pip install "headrace[serve]"'
        ) from error


def _warm_up(engine: Any, clock: StartClock) -> None:
    """Warm the engine up, phase by phase."""
    under_way: list[str] = []

    def told(phase: str) -> None:
        if under_way:
            end()
        under_way.append(phase)

    def end() -> None:
        phase = under_way.pop()
        _end(clock, phase, engine.load_gauges().get(phase, 0))

    engine.warm_up(told)
    end()


def _end(clock: StartClock, name: str, amount: int) -> None:
    """A phase is over in which kernels may have been compiled ahead: that is a phase of its own."""
    ahead = compiled_ahead()
    clock.within(Phase(name="compile", seconds=ahead.seconds, amount=ahead.kernels, threads=ahead.threads))
    clock.end(name, amount)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within, all that is made stays. The collector would look through it again and again: a tenth of all imports, and
    once more whenever the phases after them make much."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()
    # Libraries that look at the end for what they left behind would find, and complain of, all of it.
    atexit.register(gc.unfreeze)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
