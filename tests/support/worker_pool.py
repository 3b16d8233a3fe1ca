"""A broker, worker groups with a fake engine and a launcher, each in processes of their own, to be killed in parts."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from headrace.broker.config import BrokerConfig
from headrace.broker.serve import BrokerServer
from headrace.client import Client
from headrace.messages import Assignment
from headrace.processes import Child, parent
from headrace.workers.config import EngineConfig
from headrace.workers.group import GroupEvent, GroupSpec
from headrace.workers.launcher import Launcher
from tests.support.children import LIMIT, wait_until
from tests.support.fake_engine import ENGINE
from tests.support.fake_group import emit_by_seed

__all__ = ["Groups", "WorkerPool", "expected", "fake_spec", "read_stream", "serve_broker", "serve_groups"]


def expected(seed: int, count: int, choice: int = 0) -> list[int]:
    """What a fake engine says."""
    assignment = Assignment(request=b"", choice=choice, attempt=1, prompt=b"", sampling={"seed": seed})
    return [emit_by_seed(assignment, index) for index in range(count)]


def fake_spec(folder: Path, name: str = "a", ranks: int = 1, **behaviour: Any) -> GroupSpec:
    """A group of fake engines; what they do is written into a folder of their own."""
    model = folder / f"model-{name}"
    model.mkdir(exist_ok=True)
    (model / "fake.json").write_text(json.dumps(behaviour))
    config = EngineConfig(max_num_seqs=8)
    return GroupSpec(
        name=name,
        folder=model,
        model_name="fake",
        config=config,
        tensor_parallel=ranks,
        threads=1,
        engine=ENGINE,
    )


# ----------------------------------------------------------------------------------------- what runs in child processes


def serve_broker(client_endpoint: str, worker_endpoint: str, config: dict[str, Any]) -> None:
    """A broker, until SIGTERM."""
    server = BrokerServer(client_endpoint, worker_endpoint, BrokerConfig(**config))
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    with server:
        link = parent()
        assert link is not None
        link.ready()
        server.run()


def serve_groups(specs: list[dict[str, Any]], endpoint: str) -> None:
    """A launcher, until SIGTERM; ready once all groups are."""
    link = parent()
    assert link is not None
    waiting = {spec["name"] for spec in specs}

    def on_event(event: GroupEvent) -> None:
        if event.kind == "ready":
            waiting.discard(event.group)
            if not waiting:
                link.ready(pids=[pid for ranks in launcher.pids.values() for pid in ranks.values()])

    with Launcher([GroupSpec.from_wire(spec) for spec in specs], endpoint, on_event=on_event) as launcher:
        signal.signal(signal.SIGTERM, lambda *_: launcher.stop(LIMIT))
        launcher.run()


def read_stream(endpoint: str, seed: int, count: int) -> None:
    """A client that reads one stream and says ready at its first token."""
    link = parent()
    assert link is not None
    with Client(endpoint) as client, client.stream(token_ids=[1, 2, 3], seed=seed, max_tokens=count) as stream:
        for index, _ in enumerate(stream):
            if index == 0:
                link.ready()


# ------------------------------------------------------------------------------------------------------ in this process


class Groups:
    """A launcher in a thread of this process."""

    def __init__(self, specs: list[GroupSpec], endpoint: str, **limits: float) -> None:
        self.events: list[GroupEvent] = []
        self.launcher = Launcher(specs, endpoint, on_event=self.events.append, **limits)
        self.thread = threading.Thread(target=self.launcher.run, name="launcher")
        self.thread.start()

    def kinds(self, group: str) -> list[str]:
        """What was said of a group, loading left out."""
        return [event.kind for event in self.events if event.group == group and event.kind != "loading"]

    def event(self, group: str, kind: str) -> GroupEvent:
        """The last event of a kind."""
        return next(e for e in reversed(self.events) if e.group == group and e.kind == kind)

    def wait_for(self, group: str, kind: str, count: int = 1) -> None:
        """Wait until an event came so many times."""
        wait_until(lambda: self.kinds(group).count(kind) >= count, f"{group} {kind}: {self.events}")

    def pid(self, group: str, rank: int = 0) -> int:
        """A process id."""
        return self.launcher.pids[group][rank]

    def kill(self, group: str, rank: int = 0, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank."""
        os.kill(self.pid(group, rank), number)

    def close(self) -> None:
        """End everything, by force."""
        self.launcher.close()
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()


class WorkerPool:
    """Starts the parts, and ends whatever is left of them when closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = f"ipc://{folder}/clients"
        self.worker_endpoint = f"ipc://{folder}/workers"
        self.broker: Child | None = None
        self._config: dict[str, Any] = {}
        self._launchers: list[Groups] = []
        self._client: Client | None = None

    def start_broker(self, **config: Any) -> Child:
        """A broker with short periods, or after its death another one like it."""
        self._config = config or self._config or {"heartbeat": 0.25}
        arguments = {"client_endpoint": self.endpoint, "worker_endpoint": self.worker_endpoint, "config": self._config}
        self.broker = Child("broker", serve_broker, arguments).start()
        self.broker.wait_ready(LIMIT)
        return self.broker

    def kill_broker(self) -> None:
        """SIGKILL."""
        assert self.broker is not None
        self.broker.kill()
        self.broker.join(LIMIT)

    def start_groups(self, *specs: GroupSpec, **limits: float) -> Groups:
        """A launcher; returns when all of its groups are ready."""
        groups = Groups(list(specs), self.worker_endpoint, **limits)
        self._launchers.append(groups)
        for spec in specs:
            groups.wait_for(spec.name, "ready")
            self.wait_for(lambda report, name=spec.name: self.group(name, report).get("state") == "ready")
        return groups

    @property
    def client(self) -> Client:
        """The client that all tests of one pool share."""
        if self._client is None:
            self._client = Client(self.endpoint)
        return self._client

    def read(self, seed: int, count: int, on_token: Callable[[int], None] = lambda index: None) -> list[int]:
        """The tokens of one stream; `on_token` is called with the number of tokens so far."""
        return list(self.tokens(seed, count, on_token))

    def tokens(self, seed: int, count: int, on_token: Callable[[int], None]) -> Iterator[int]:
        """The same, one after the other."""
        seen = 0
        with self.client.stream(token_ids=[1, 2, 3], seed=seed, max_tokens=count, ignore_eos=True) as stream:
            for delta in stream:
                for token in delta.token_ids:
                    seen += 1
                    yield token
                    on_token(seen)

    def wait_for(self, condition: Callable[[dict[str, Any]], Any]) -> None:
        """Wait until the broker's report fulfils a condition."""
        wait_until(lambda: condition(self.client.status()), f"the report of the broker: {self.client.status()}")

    def group(self, name: str, report: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the broker says of a group; empty if it does not know it."""
        groups = (report or self.client.status())["groups"]
        return next((group for group in groups if group["name"] == name), {})

    def close(self) -> None:
        """End everything."""
        if self._client is not None:
            self._client.close()
        for launcher in self._launchers:
            launcher.close()
        if self.broker is not None:
            self.broker.terminate()
