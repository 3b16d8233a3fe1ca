"""The launcher: starts worker groups, restarts those that die, and ends them in good order. Imports no torch.

    start     start all groups; returns at once
    run       supervise until `stop`, or until no group is left
    stop      from any thread or signal handler: drain, then end; the second time, end
    close     end everything now

What happens to a group is decided in `launcher_life`; this is the shell around it: processes, pipes, one loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from headrace.errors import ConfigError, HeadraceError
from headrace.processes import Child
from headrace.workers.group import GroupEvent, GroupSpec
from headrace.workers.launcher_life import (
    HUNG_AFTER,
    LEADER_SILENCE,
    Action,
    Emit,
    Ended,
    Event,
    GroupLife,
    Kill,
    Said,
    Start,
    Stop,
    Tell,
    Tick,
)
from headrace.workers.rank import run_rank
from headrace.workers.rank_threads import cores, share_of

__all__ = ["GroupEvent", "GroupSpec", "Launcher"]

logger = logging.getLogger(__name__)

OnEvent = Callable[[GroupEvent], None]

_TICK = 1.0
_LEVELS = {"lost": logging.WARNING, "failed": logging.ERROR, "loading": logging.DEBUG}


class Launcher:
    """Supervises groups that serve the broker at `endpoint`.

    Args:
        specs: of the groups.
        endpoint: of the broker's face for workers.
        on_event: is told what happens, in the thread that calls `start` or `run`.
        hung_after: seconds after which a group that has work but makes no step is ended and started again.
        leader_silence: seconds after which the same happens to a group whose leader says nothing.

    Attributes:
        failures: groups that failed for good, and why.

    Raises:
        ConfigError: there are no groups, or two of one name.
    """

    def __init__(
        self,
        specs: Sequence[GroupSpec],
        endpoint: str,
        *,
        on_event: OnEvent | None = None,
        hung_after: float = HUNG_AFTER,
        leader_silence: float = LEADER_SILENCE,
    ) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"Groups need names of their own, at least one; given: {', '.join(names) or 'none'}.")
        self.failures: dict[str, HeadraceError] = {}
        self._on_event = on_event
        ranks = sum(spec.tensor_parallel for spec in specs)
        available = cores()
        share = share_of(ranks, available)
        crowded = sum((spec.threads or share) * spec.tensor_parallel for spec in specs) >= available
        self._groups = [
            _Group(
                GroupLife(spec, hung_after=hung_after, leader_silence=leader_silence),
                endpoint,
                threads=spec.threads or share,
                crowded=crowded,
            )
            for spec in specs
        ]
        self._stops: deque[float] = deque()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._running = threading.Lock()
        self._closed = False

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> dict[str, dict[int, int]]:
        """The process ids of the ranks that run, by group and rank."""
        return {group.life.spec.name: group.pids() for group in self._groups}

    def start(self) -> None:
        """Start all groups; harmless when repeated, and after `close`."""
        if not self._closed:
            for group in self._groups:
                self._handle(group, Tick())

    def run(self) -> None:
        """Supervise until `stop` has done its work, or every group failed for good."""
        with self._running:
            try:
                self.start()
                while not self._closed and not all(group.life.over for group in self._groups):
                    self._turn()
            finally:
                self._end_all()

    def stop(self, grace: float = 30.0) -> None:
        """Drain all groups within `grace` seconds, then let `run` return; called again, end them at once."""
        self._stops.append(grace)
        with contextlib.suppress(OSError):  # full: a wake-up is on its way; closed: it ended already
            os.write(self._wake_out, b"x")

    def close(self) -> None:
        """End everything now, and wait until it has ended."""
        self.stop(0.0)
        self.stop(0.0)
        with self._running:
            if self._closed:
                return
            self._closed = True
            self._end_all()
            os.close(self._wake_in)
            os.close(self._wake_out)
            self._wake_in = self._wake_out = -1

    # ---------------------------------------------------------------------------------------------------- one turn

    def _turn(self) -> None:
        now = time.monotonic()
        wake_at = min(now + _TICK, *(group.life.wake_at() for group in self._groups))
        sources = [source for group in self._groups for source in group.sources()]
        ready = set(wait([self._wake_in, *sources], max(0.0, wake_at - now)))
        if self._wake_in in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_in, 64)
        while self._stops:
            grace = self._stops.popleft()
            for group in self._groups:
                self._handle(group, Stop(grace))
        for group in self._groups:
            for event in group.events(ready):
                self._handle(group, event)
            self._handle(group, Tick())

    def _handle(self, group: _Group, event: Event) -> None:
        for action in group.life.handle(event, time.monotonic()):
            if isinstance(action, Emit):
                self._emit(action.event)
            else:
                for consequence in group.act(action):
                    self._handle(group, consequence)

    def _emit(self, event: GroupEvent) -> None:
        logger.log(_LEVELS.get(event.kind, logging.INFO), "group %s: %s", event.group, event.text)
        if event.start is not None:
            logger.info("group %s: started in %.1f s: %s", event.group, event.start.seconds, event.start)
        if event.kind == "failed" and event.error is not None:
            self.failures[event.group] = event.error
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                logger.exception("on_event failed; supervision goes on")

    def _end_all(self) -> None:
        for group in self._groups:
            group.end()


class _Group:
    """The processes of one group."""

    def __init__(self, life: GroupLife, endpoint: str, *, threads: int, crowded: bool) -> None:
        self.life = life
        self._settings = {
            "spec": life.spec.to_wire(),
            "endpoint": endpoint,
            "threads": threads,
            "crowded": crowded,
        }
        self._ranks: dict[int, Child] = {}

    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: child.pid or 0 for rank, child in list(self._ranks.items())}

    def sources(self) -> list[Any]:
        """What to wait for."""
        children = self._ranks.values()
        return [child.sentinel for child in children] + [child.pipe for child in children if not child.closed]

    def events(self, ready: set[Any]) -> list[Event]:
        """What the ranks said, and which of them ended."""
        events: list[Event] = []
        for rank, child in list(self._ranks.items()):
            ended = child.sentinel in ready
            if ended or child.pipe in ready:
                while (message := child.receive()) is not None:
                    events.append(Said(rank, message))
            if ended:
                del self._ranks[rank]
                events.append(Ended(rank, child.join()))
        return events

    def act(self, action: Action) -> list[Event]:
        """Do something with the ranks; what went wrong."""
        match action:
            case Start():
                return self._start()
            case Kill():
                for child in self._ranks.values():
                    child.kill()
            case Tell():
                if (leader := self._ranks.get(0)) is not None:
                    leader.send(action.kind, **action.fields)
        return []

    def end(self) -> None:
        """End what still runs, and wait for it."""
        for child in self._ranks.values():
            child.kill()
        for child in self._ranks.values():
            child.join()
        self._ranks.clear()

    def _start(self) -> list[Event]:
        size = self.life.spec.tensor_parallel
        pipes = [Pipe(duplex=False) for _ in range(1, size)]
        failed: list[Event] = []
        for rank in range(size):
            ends: dict[str, Any] = {"followers": [w for _, w in pipes]} if rank == 0 else {"leader": pipes[rank - 1][0]}
            name = f"{self.life.spec.name}/{rank}"
            child = Child(name, run_rank, {**self._settings, "rank": rank, "began": time.monotonic(), **ends})
            try:
                self._ranks[rank] = child.start()
            except OSError as error:
                logger.error("rank %s could not be started: %s", name, error)
                failed.append(Ended(rank, None))
        for pipe in pipes:  # only the ranks hold them now, so the end of one is seen by the other
            _close(pipe)
        return failed


def _close(pipe: tuple[Connection, Connection]) -> None:
    for end in pipe:
        end.close()
