"""The life of one group as its launcher sees it, pure: what ranks say and how they end in, what to do out.

Laws
 1. A group lives and dies whole: the end of any rank is the end of all.
 2. A group that died is started again, later each time; a minute of good service is a clean slate. A setting that is
    wrong does not get better by trying: such a group failed for good.
 3. Only progress counts. A group that has work and makes no step, or whose leader says nothing, is ended.
 4. Stopping drains. Stopping twice, or past the time allowed, kills.

    state      event                              next
    waiting    time is up                         starting   Start
    starting   all ranks are warm                 serving    Tell the leader to serve
    any alive  a rank ended, the group hangs      dying      Kill
    dying      the last rank ended                waiting, or failed if a setting is wrong
    serving    Stop                               stopping   Tell the leader to drain
    starting   Stop                               stopping   Kill
    stopping   the leader ended, time is up       stopping   Kill
    stopping   the last rank ended                stopped
    waiting    Stop                               stopped
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Any, NamedTuple

from headrace.errors import ConfigError, HeadraceError, UnsupportedVersionError, from_wire
from headrace.processes import describe_exit
from headrace.workers.group import GroupEvent, GroupSpec
from headrace.workers.start_report import Phase, StartReport

__all__ = [
    "HUNG_AFTER",
    "LEADER_SILENCE",
    "Action",
    "Emit",
    "Ended",
    "Event",
    "GroupLife",
    "Kill",
    "Said",
    "Start",
    "State",
    "Stop",
    "Tell",
    "Tick",
]

BACKOFF = (0.5, 30.0)
GOOD_SERVICE = 60.0
START_SILENCE = 1800.0  # loading from a slow disk, compiling: minutes without a word are normal
LEADER_SILENCE = 30.0  # the leader has a word each second
HUNG_AFTER = 180.0  # the broker gives a hung group up sooner, so that its streams go on elsewhere
DRAIN_MARGIN = 5.0  # beyond the grace that was asked for
PAUSE = 5.0  # a longer gap between ticks was a pause of our own


class State(Enum):
    """Where a group is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    SERVING = "serving"
    DYING = "dying"
    STOPPING = "stopping"
    FAILED = "failed"
    STOPPED = "stopped"


class Said(NamedTuple):
    """A rank said something."""

    rank: int
    message: dict[str, Any]


class Ended(NamedTuple):
    """A rank's process ended; its code is None if it could not even be started."""

    rank: int
    exitcode: int | None


class Stop(NamedTuple):
    """Drain within `grace` seconds and end."""

    grace: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; to come at least once a second."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start all ranks."""


@dataclass(frozen=True, slots=True)
class Kill:
    """End all ranks that still run, now."""


class Tell(NamedTuple):
    """Tell the leader something."""

    kind: str
    fields: dict[str, Any]


class Emit(NamedTuple):
    """Tell people something."""

    event: GroupEvent


Event = Said | Ended | Stop | Tick
Action = Start | Kill | Tell | Emit


class GroupLife:
    """One group, from its first start to its end."""

    def __init__(self, spec: GroupSpec, *, hung_after: float = HUNG_AFTER, leader_silence: float = LEADER_SILENCE):
        self.spec = spec
        self.state = State.WAITING
        self.error: HeadraceError | None = None  # that the ranks of this life reported first
        self._hung_after = hung_after
        self._leader_silence = leader_silence
        self._alive: set[int] = set()
        self._warm: set[int] = set()
        self._loaded: dict[int, tuple[int, int]] = {}
        self._phase = ""  # the last kind of event that was emitted
        self._deadline = -inf  # waiting: when to start; stopping: when to kill
        self._delay = BACKOFF[0]
        self._start_report = StartReport(())
        self._warm_at = -inf
        self._ready_at: float | None = None
        self._heard_at = self._step_at = 0.0
        self._step = -1
        self._ticked_at: float | None = None
        self._out: list[Action] = []

    @property
    def over(self) -> bool:
        """Whether it will never run again."""
        return self.state in (State.FAILED, State.STOPPED)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Everything that follows from an event, in order."""
        self._out = []
        match event:
            case Said():
                self._on_said(event.rank, event.message, now)
            case Ended():
                self._on_ended(event, now)
            case Stop():
                self._on_stop(event.grace, now)
            case Tick():
                self._on_tick(now)
        return self._out

    def wake_at(self) -> float:
        """When to send a Tick at the latest."""
        return self._deadline if self.state in (State.WAITING, State.STOPPING) else inf

    # ------------------------------------------------------------------------------------------------- ranks' words

    def _on_said(self, rank: int, message: dict[str, Any], now: float) -> None:
        self._heard_at = now
        kind = message["kind"]
        if kind == "error" and self.error is None:
            self.error = from_wire(message["error"])
        if self.state is State.STARTING:
            self._on_progress(rank, kind, message, now)
        elif self.state is State.SERVING and rank == 0:
            self._on_leader(kind, message, now)

    def _on_progress(self, rank: int, kind: str, message: dict[str, Any], now: float) -> None:
        if kind == "loading":
            self._loaded[rank] = (message["done"], message["total"])
            done, total = (sum(column) for column in zip(*self._loaded.values(), strict=True))
            self._emit("loading", f"loading {self.spec.model_name}", done=done, total=total)
        elif kind == "warming" and self._phase == "loading":
            self._emit("warming", "warming up")
        elif kind == "warm":
            self._warm.add(rank)
            self._start_report = StartReport.from_wire(message)  # of the rank that took longest, in the end
            self._warm_at = now
            if len(self._warm) == self.spec.tensor_parallel:
                self.state = State.SERVING
                self._step_at, self._step = now, -1
                self._out.append(Tell("serve", {}))

    def _on_leader(self, kind: str, message: dict[str, Any], now: float) -> None:
        if kind == "beat":
            if not message["busy"] or message["step"] != self._step:
                self._step_at, self._step = now, message["step"]
        elif kind == "waiting" and self._phase != "waiting":
            self._emit("warming", "warm; waiting for a broker to answer", phase="waiting")
        elif kind == "ready" and self._phase != "ready":
            first, self._ready_at = self._ready_at is None, now
            start = self._start_report.then(Phase(name="broker", seconds=now - self._warm_at)) if first else None
            self._emit("ready", f"ready: serves {self.spec.model_name}", start=start)

    # ------------------------------------------------------------------------------------------------ beginnings, ends

    def _on_tick(self, now: float) -> None:
        gap = now - (now if self._ticked_at is None else self._ticked_at)
        self._ticked_at = now
        if gap > PAUSE:  # we were stopped, and could not have heard
            self._heard_at = min(now, self._heard_at + gap)
            self._step_at = min(now, self._step_at + gap)
        if self.state is State.WAITING and now >= self._deadline:
            self._start(now)
        elif self.state is State.STARTING and now - self._heard_at > START_SILENCE:
            self._lose(f"said nothing for {START_SILENCE:.0f} s while it started", now)
        elif self.state is State.SERVING and now - self._heard_at > self._leader_silence:
            self._lose(f"lost its leader, which said nothing for {self._leader_silence:.0f} s", now)
        elif self.state is State.SERVING and now - self._step_at > self._hung_after:
            self._lose(f"made no step for {self._hung_after:.0f} s", now)
        elif self.state is State.STOPPING and now >= self._deadline:
            self._deadline = inf
            self._out.append(Kill())

    def _start(self, now: float) -> None:
        self.state = State.STARTING
        self.error = None
        self._alive = set(range(self.spec.tensor_parallel))
        self._warm.clear()
        self._loaded.clear()
        self._ready_at = None
        self._heard_at = now
        self._emit("starting", f"starting {self.spec.tensor_parallel} process(es) for {self.spec.model_name}")
        self._out.append(Start())

    def _on_ended(self, event: Ended, now: float) -> None:
        self._alive.discard(event.rank)
        if self.state is State.STOPPING and event.rank == 0:
            self._out.append(Kill())  # followers of a leader that is done
        elif self.state in (State.STARTING, State.SERVING):
            how = "could not be started" if event.exitcode is None else describe_exit(event.exitcode)
            why = "" if self.error is None else f": {self.error.message}"
            self._lose(f"lost rank {event.rank}, which {how}{why}", now)
        if not self._alive:
            self._settle(now)

    def _lose(self, what: str, now: float) -> None:
        if not self._is_final():
            self._emit("lost", what, error=self.error)
        self.state = State.DYING
        self._out.append(Kill())

    def _is_final(self) -> bool:
        return isinstance(self.error, ConfigError | UnsupportedVersionError)

    def _settle(self, now: float) -> None:
        """All ranks are gone; what next?"""
        if self.state is State.STOPPING:
            self._end()
        elif self.state is not State.DYING:
            return
        elif self._is_final():
            assert self.error is not None
            self.state = State.FAILED
            self._emit("failed", self.error.message, error=self.error)
        else:
            first, longest = BACKOFF
            if self._ready_at is not None and now - self._ready_at >= GOOD_SERVICE:
                self._delay = first
            self.state = State.WAITING
            self._deadline = now + self._delay
            self._emit("restarting", f"starts again in {self._delay:g} s")
            self._delay = min(longest, 2 * self._delay)

    def _on_stop(self, grace: float, now: float) -> None:
        match self.state:
            case State.WAITING:
                self._end()
            case State.SERVING:
                self.state = State.STOPPING
                self._deadline = now + max(0.0, grace) + DRAIN_MARGIN
                self._out.append(Tell("drain", {"grace": max(0.0, grace)}))
            case State.STARTING | State.STOPPING:
                self.state = State.STOPPING
                self._deadline = inf
                self._out.append(Kill())
            case State.DYING:
                self.state = State.STOPPING
                self._deadline = now + DRAIN_MARGIN

    def _end(self) -> None:
        self.state = State.STOPPED
        self._emit("stopped", "stopped")

    def _emit(self, kind: str, text: str, *, phase: str = "", **fields: Any) -> None:
        self._phase = phase or kind
        self._out.append(Emit(GroupEvent(group=self.spec.name, kind=kind, text=text, **fields)))
