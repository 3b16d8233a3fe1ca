"""What the launcher says of its groups, as lines for people; and whether there is anything left to serve with."""

from __future__ import annotations

from headrace.errors import InternalError
from headrace.scripts.phases import Phases
from headrace.scripts.terminal import Terminal
from headrace.workers.group import GroupEvent
from headrace.workers.start_report import StartReport

__all__ = ["Groups"]

_ATTEMPTS = 3  # a group that was started so often and never got ready will not


class Groups:
    """The groups of one launcher.

    Args:
        names: of all of them.
        terminal: takes remarks.
        phases: takes the progress of loading.

    Attributes:
        ready: names of those that serve.
        slowest: how the group that took longest was started; None before.
    """

    def __init__(self, names: tuple[str, ...], terminal: Terminal, phases: Phases) -> None:
        self.ready: set[str] = set()
        self.slowest: StartReport | None = None
        self._names = names
        self._terminal = terminal
        self._phases = phases
        self._served = False  # all were ready once
        self._loads: dict[str, tuple[int, int]] = {}  # bytes done and in all
        self._lost: dict[str, int] = {}

    @property
    def all_ready(self) -> bool:
        """Whether every group serves."""
        return len(self.ready) == len(self._names)

    def take(self, event: GroupEvent) -> None:
        """Take note of an event.

        Raises:
            HeadraceError: there will be no group to serve with.
        """
        match event.kind:
            case "loading":
                self._loads[event.group] = (event.done, event.total)
            case "ready":
                self.ready.add(event.group)
                if event.start is not None and (self.slowest is None or event.start.seconds > self.slowest.seconds):
                    self.slowest = event.start
            case "lost" | "failed" | "stopped":
                self.ready.discard(event.group)
        if event.kind == "failed" and not (self._served and self.ready):
            raise event.error or InternalError(f"{event.group}: {event.text}")
        if self._served:
            self._tell(event)
        else:
            self._start(event)
        self._served = self._served or self.all_ready

    def _tell(self, event: GroupEvent) -> None:
        """While it serves, only what changes is worth a line."""
        if event.kind in ("ready", "lost", "failed"):
            took = "" if event.start is None else f", after {event.start.seconds:.1f} s"
            self._terminal.note(f"{event.group}: {event.text}{took}")

    def _start(self, event: GroupEvent) -> None:
        match event.kind:
            case "loading":
                done, total = (sum(column) for column in zip(*self._loads.values(), strict=True))
                self._phases("loading", done, total or None)
            case "warming":
                self._phases(event.text)
            case "lost":
                self._terminal.note(f"{event.group}: {event.text}")
                count = self._lost[event.group] = self._lost.get(event.group, 0) + 1
                if count >= _ATTEMPTS:
                    raise event.error or InternalError(
                        f"{event.group} was started {count} times and never got ready: it {event.text}."
                    )
