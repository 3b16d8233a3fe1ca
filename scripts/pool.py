"""Broker, gateway and worker groups as children of this process: started, watched, started again, ended together.

    start     the broker, then the gateway; meanwhile another child gets the model, so that torch never comes in here
    load      the launcher's groups, once the addresses are taken
    greet     where everything is; then an answer to a prompt, if there is one
    stay      until a signal
    drain     answers in work get a while to finish; a second signal ends everything at once

One thread decides, this one. The launcher and the greeting run in threads of their own and report through a queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from headrace.errors import HeadraceError, InternalError
from headrace.processes import Child, describe_exit
from headrace.scripts.groups import Groups
from headrace.scripts.parts import run_broker, run_fetch, run_gateway
from headrace.scripts.phases import Phases
from headrace.scripts.service import Service
from headrace.scripts.signals import catch_signals
from headrace.scripts.start_table import start_table
from headrace.scripts.terminal import Terminal
from headrace.workers.group import ENGINE, GroupEvent, GroupSpec
from headrace.workers.rank_threads import time_awake

if TYPE_CHECKING:
    from headrace.gateway.settings import GatewaySettings
    from headrace.workers.config import EngineConfig
    from headrace.workers.launcher import Launcher

__all__ = ["Greeter", "Plan", "Pool"]

_TICK = 1.0  # seconds between two looks at the clock
_LAST_WORDS = 2.0  # seconds for a child that has nothing left to do


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to start.

    Attributes:
        model: folder, file or id; None for the default one.
        name: what clients call it; None takes it from the model.
        config: of the engines.
        client_endpoint: where clients find the broker.
        worker_endpoint: where groups find the broker.
        group_names: one per group.
        tensor_parallel: processes per group.
        threads: CPU threads of each; None divides the cores.
        broker: whether to start one, or to work for one that runs elsewhere.
        gateway: its settings; None for no gateway.
        grace: seconds that answers in work get after the first signal.
        engine: `module:function` that loads the engine of a rank.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str | None
    name: str | None
    config: EngineConfig
    client_endpoint: str
    worker_endpoint: str
    group_names: tuple[str, ...] = ("group-0",)
    tensor_parallel: int = 1
    threads: int | None = None
    broker: bool = True
    gateway: GatewaySettings | None = None
    grace: float = 30.0
    engine: str = ENGINE

    def __post_init__(self) -> None:
        self.specs(Path(), self.name or "any")  # what is wrong is said before a model is fetched

    def specs(self, folder: Path, model: str) -> list[GroupSpec]:
        """The groups, serving the model of a folder under a name.

        Raises:
            ConfigError: a value is out of range.
        """
        return [
            GroupSpec(
                name=name,
                folder=folder,
                model_name=model,
                config=self.config,
                tensor_parallel=self.tensor_parallel,
                threads=self.threads,
                engine=self.engine,
            )
            for name in self.group_names
        ]


class Greeter(Protocol):
    """What happens once all is ready, in a thread of its own."""

    def run(self, pool: Pool) -> int | None:
        """Greet; the pool ends with the code that this returns, or stays if that is None."""

    def stop(self) -> None:
        """Return from `run` soon; from any thread."""


class _Asked(Exception):  # noqa: N818  it is no error
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Pool:
    """Runs a plan.

    Attributes:
        plan: what runs.
        model: name of the served model, once known.
        page: URL of the chat page, if there is a gateway.
    """

    def __init__(self, plan: Plan, terminal: Terminal, greeter: Greeter) -> None:
        self.plan = plan
        self.model = ""
        self.page: str | None = None
        self._folder = Path()
        self._terminal = terminal
        self._greeter = greeter
        self._phases = Phases(terminal)
        self._groups = Groups(plan.group_names, terminal, self._phases)
        self._services: dict[str, Service] = {}
        self._fetch: Child | None = None
        self._launcher: Launcher | None = None
        self._launching: Thread | None = None
        self._news: SimpleQueue[GroupEvent | HeadraceError | int | None] = SimpleQueue()
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signals: list[int] = []
        self._greeting = False
        self._draining = False
        self._code: int | None = None  # to end with; None stays

    @property
    def client_endpoint(self) -> str:
        """Where clients find the broker, with the port in force."""
        return self._endpoint("endpoint", self.plan.client_endpoint)

    @property
    def worker_endpoint(self) -> str:
        """Where groups find the broker, likewise."""
        return self._endpoint("worker_endpoint", self.plan.worker_endpoint)

    def _endpoint(self, name: str, planned: str) -> str:
        broker = self._services.get("broker")
        return planned if broker is None else str(broker.facts.get(name, planned))

    def run(self) -> int:
        """Everything until the end; the exit code.

        Raises:
            HeadraceError: it could not start, or no group is left.
        """
        grace = _LAST_WORDS
        with catch_signals(self._on_signal):
            try:
                self._start()
                self._load()
                self._greet()
                self._until(lambda: self._code is not None)
                self._drain()
                return self._code or 0
            except _Asked as asked:
                code = self._leave(asked.number)
                grace = 0.0 if code else _LAST_WORDS
                return code
            finally:
                self._end(grace)

    # ---------------------------------------------------------------------------------------------------- phases

    def _start(self) -> None:
        plan = self.plan
        self._fetch = Child("headrace-fetch", run_fetch, {"model": plan.model, "name": plan.name}).start()
        if plan.broker:
            self._serve("broker", self._make_broker)
        if plan.gateway is not None:
            self.page = str(self._serve("gateway", self._make_gateway).facts["url"])
        self._until(self._fetched)
        self._phases.end()

    def _serve(self, name: str, make: Callable[[dict[str, Any]], Child]) -> Service:
        service = self._services[name] = Service(name, make, self._terminal.note)
        service.start()
        self._until(lambda: service.ready)
        return service

    def _make_broker(self, facts: dict[str, Any]) -> Child:
        settings = {
            "client_endpoint": self.client_endpoint,
            "worker_endpoint": self.worker_endpoint,
            "awake": time_awake(self.plan.config.device),
        }
        return Child("headrace-broker", run_broker, settings)

    def _make_gateway(self, facts: dict[str, Any]) -> Child:
        assert self.plan.gateway is not None
        settings = dataclasses.asdict(self.plan.gateway)
        if facts:  # a free port was taken: the page stays where it is
            settings["port"] = urlsplit(facts["url"]).port
        return Child("headrace-gateway", run_gateway, {"endpoint": self.client_endpoint, "settings": settings})

    def _fetched(self) -> bool:
        """Whether the model is there; hears how far it is."""
        fetch = self._fetch
        assert fetch is not None
        while (message := fetch.receive()) is not None:
            if message["kind"] == "progress":
                self._phases(message["phase"], message["done"], message["total"])
            elif message["kind"] == "ready":
                self.model, self._folder = message["name"], Path(message["folder"])
        if not fetch.closed:
            return False
        code = fetch.join(5.0)
        if not self.model:
            raise fetch.error or InternalError(f"The process that gets the model {describe_exit(code)}.")
        return True

    def _load(self) -> None:
        from headrace.workers.launcher import Launcher

        if not os.environ.get("HEADRACE_DEBUG"):  # what it would log comes as events, too
            logging.getLogger("headrace.workers.launcher").setLevel(logging.CRITICAL)
        specs = self.plan.specs(self._folder, self.model)
        self._launcher = Launcher(specs, self.worker_endpoint, on_event=self._post)
        self._launching = Thread(target=self._launch, args=(self._launcher,), name="launcher", daemon=True)
        self._phases("starting workers")
        self._launching.start()
        self._until(lambda: self._groups.all_ready)
        self._phases.end()
        if self._groups.slowest is not None:
            for line in start_table(self._groups.slowest):
                self._terminal.note(self._terminal.paint(line, "dim"))

    def _launch(self, launcher: Launcher) -> None:
        try:
            launcher.start()
            launcher.run()
        except Exception as error:
            self._post(_known(error, "The launcher"))
        self._post(None)

    def _greet(self) -> None:
        def greet() -> None:
            try:
                self._post(self._greeter.run(self))
            except Exception as error:
                self._post(_known(error, "The greeting"))

        self._greeting = True
        Thread(target=greet, name="greeting", daemon=True).start()

    # --------------------------------------------------------------------------------------------------- one turn

    def _until(self, condition: Callable[[], bool], limit: float | None = None) -> None:
        """Turn after turn until the condition holds or `limit` seconds are over."""
        deadline = None if limit is None else time.monotonic() + limit
        while not condition() and (deadline is None or time.monotonic() < deadline):
            self._turn(deadline)

    def _turn(self, deadline: float | None) -> None:
        """Wait for something to happen, and deal with it."""
        services = self._services.values()
        times = [at for at in (deadline, *(service.restart_at for service in services)) if at is not None]
        sources: list[Any] = [self._wake_in, *(service.child.pipe for service in services if service.child is not None)]
        if self._fetch is not None and not self._fetch.closed:
            sources.append(self._fetch.pipe)
        times.append(time.monotonic() + _TICK)
        wait(sources, max(0.0, min(times) - time.monotonic()))
        self._phases.tick()
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_in, 4096)
        if self._signals:
            raise _Asked(self._signals.pop(0))
        for service in services:
            service.turn()
        with contextlib.suppress(Empty):
            while True:
                self._take(self._news.get_nowait())

    def _take(self, news: GroupEvent | HeadraceError | int | None) -> None:
        match news:
            case GroupEvent() if not self._draining:
                self._groups.take(news)
            case HeadraceError():
                raise news
            case int():
                self._code = news

    # ---------------------------------------------------------------------------------------------------- the end

    def _leave(self, number: int) -> int:
        """A signal came: end in good order if there is something to finish; the exit code."""
        if not self._greeting:
            return 128 + number
        self._terminal.note(f"Stopping. Answers in work have {self.plan.grace:g} s to finish; Ctrl-C ends them now.")
        try:
            self._drain()
        except _Asked as again:
            return 128 + again.number
        return 0

    def _drain(self) -> None:
        """The gateway finishes what it has in work while there are groups to do it, then they finish theirs."""
        launcher, launching, gateway = self._launcher, self._launching, self._services.get("gateway")
        assert launcher is not None
        assert launching is not None
        deadline = time.monotonic() + self.plan.grace
        self._draining = True
        self._greeter.stop()
        if gateway is not None:
            gateway.ask_to_end()
            self._until(lambda: gateway.child is None, self.plan.grace + _LAST_WORDS)
        left = max(0.0, deadline - time.monotonic())
        launcher.stop(left)
        self._until(lambda: not launching.is_alive(), left + _LAST_WORDS)

    def _end(self, grace: float) -> None:
        """End every process that is left."""
        if self._launcher is not None:
            self._launcher.close()
        if self._fetch is not None:
            self._fetch.terminate(grace)
        for service in reversed(self._services.values()):
            service.end(grace)

    # ------------------------------------------------------------------------------------------------ other threads

    def _post(self, news: GroupEvent | HeadraceError | int | None) -> None:
        self._news.put(news)
        self._wake()

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it wakes anyway
            os.write(self._wake_out, b"x")


def _known(error: Exception, what: str) -> HeadraceError:
    if isinstance(error, HeadraceError):
        return error
    return InternalError(f"{what} failed: {type(error).__name__}: {error}.")
